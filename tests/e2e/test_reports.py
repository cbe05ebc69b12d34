"""The page of a run, and runs side by side: report.json, report.html, `moesaic compare`."""

import csv
import json
import re
import shutil
import signal
import subprocess
import time

import pytest

import tiny_run


def report(out):
    return json.loads((out / "report.json").read_text())


def page_data(path):
    """What a page draws; the page asks for nothing from outside."""
    html = path.read_text()
    assert not re.search(r"""(src|href)=["']""", html.split('<script id="data"')[0])
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL).group(1)
    return json.loads(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with two held-out sets and a task, and its folder."""
    folder = tmp_path_factory.mktemp("report")
    tiny_run.make_run(folder, initializer_range=0.3)
    for name in ["near", "far"]:
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"inputs": f"{a} {b} ", "targets": f"{b} {a} {a}" if name == "near" else f"{a} {a}"}) + "\n"
            for a in tiny_run.WORDS[:3] for b in tiny_run.WORDS[3:6]))
    (folder / "quiz.jsonl").write_text(json.dumps(
        {"inputs": "red dog ", "answer_choices": ["dog red red", "red"], "target": "dog red red"}) + "\n")
    out = tiny_run.train(folder, "out", dataset_dir=str(folder), eval_dataset=["near.jsonl", "far.jsonl"], eval_steps=4,
                         eval={"tasks": [str(folder / "quiz.jsonl")]}, logging_steps=2)
    return folder, out


def test_a_report_tells_the_run(trained):
    _, out = trained
    told = report(out)
    assert told["status"] == "finished" and told["steps"] == told["max_steps"] == told["weights_of"] == 8
    assert told["command"].startswith("moesaic train ") and str(out.parent) in told["command"]
    assert told["machine"]["cores"] > 0 and told["machine"]["memory_bytes"] > 2**30 and told["peak_memory_bytes"] > 2**20
    assert told["settings"]["num_experts"] == 3
    assert told["result_bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert [row["step"] for row in told["log"] if "loss" in row] == [2, 4, 6, 8]
    logged = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert told["log"] == logged
    assert [row["step"] for row in told["routing"]] == [2, 4, 6, 8] and len(told["routing_layers"]) == 2
    assert told["data"][0]["drawn"] == 64 and told["data"][0]["rows"] == 100
    assert page_data(out / "report.html") == told


def test_every_data_set_has_its_evaluation_loss(trained):
    _, out = trained
    rows = [row for row in report(out)["log"] if "eval_loss" in row]
    assert [row["step"] for row in rows] == [4, 8]
    for row in rows:
        low, high = sorted([row["eval_near.jsonl_loss"], row["eval_far.jsonl_loss"]])
        assert low < row["eval_loss"] < high
    assert rows[1]["eval_near.jsonl_loss"] < rows[0]["eval_near.jsonl_loss"]


def test_tasks_and_samples_stand_before_and_after(trained):
    _, out = trained
    told = report(out)
    scored = [row for row in told["log"] if "eval/quiz/acc" in row]
    assert [row["step"] for row in scored] == [0, 8]
    assert told["samples_from"] == "evaluation" and len(told["samples"]) == 4
    assert [sample["data_set"] for sample in told["samples"][:2]] == ["near.jsonl", "far.jsonl"]
    sample = told["samples"][0]
    assert sample["prompt"].endswith("red one") and sample["reference"].strip() == "one red red"
    assert sample["before"] != sample["after"]


def test_rows_of_the_training_data_are_samples_where_nothing_is_held_out(tmp_path):
    out = tiny_run.train(tmp_path, "plain", report_to=["none"])
    told = report(out)
    assert told["samples_from"] == "training" and len(told["samples"]) == 4
    assert [row["step"] for row in told["log"]] == [4, 8], "the report needs no other log"
    assert not (out / "train_log.jsonl").exists()


def test_a_run_that_goes_on_tells_all_of_it(tmp_path):
    whole = tiny_run.train(tmp_path, "whole", max_steps=400, save_steps=20, logging_steps=10)
    run = tiny_run.make_run(tmp_path, output_dir=str(tmp_path / "parts"), max_steps=400, save_steps=20, logging_steps=10,
                            lora_dropout=0.0, learning_rate=3e-2)
    process = subprocess.Popen(tiny_run.command("train", run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "parts" / "train_log.jsonl"
    deadline = time.time() + 60
    while not (log.exists() and log.read_text().count("\n") > 1) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    stopped = report(tmp_path / "parts")
    assert stopped["status"] == "interrupted" and 0 < stopped["steps"] < 400 and stopped["weights_of"] is None
    tiny_run.run("train", run, "--resume", "auto")
    told = report(tmp_path / "parts")
    assert told["status"] == "finished" and told["seconds"] > stopped["seconds"]
    assert told["started"] == stopped["started"] and told["samples"][0]["before"] == stopped["samples"][0]["before"]
    steps = lambda rows: [(row["step"], row["loss"]) for row in rows]
    assert steps(told["log"]) == steps(report(whole)["log"])


def test_steps_that_are_run_again_are_told_once(tmp_path):
    changes = dict(save_steps=4, save_total_limit=0, logging_steps=2)
    out = tiny_run.train(tmp_path, "out", **changes)
    whole = report(out)
    shutil.rmtree(out / "checkpoint-8")  # as of a process that was killed behind its last log line
    tiny_run.run("train", tmp_path / "out.yaml", "--resume", "auto")
    rows = lambda told: [(row["step"], row["loss"]) for row in told["log"]]
    assert rows(report(out)) == rows(whole)
    assert report(out)["routing"] == whole["routing"]


def test_a_failed_run_says_why(tmp_path):
    run = tiny_run.make_run(tmp_path, initializer_range=0.3, learning_rate=1e30, max_grad_norm=0, max_steps=50)
    done = tiny_run.moesaic("train", run)
    assert done.returncode != 0
    told = report(tmp_path / "out")
    assert told["status"] == "failed" and "training diverged" in told["message"]


# --- early stopping --------------------------------------------------------------------------------------------------

def test_an_early_end_says_when_why_and_which_weights(tmp_path):
    run = tiny_run.make_run(tmp_path, initializer_range=0.3, learning_rate=0.3, max_steps=60, val_size=10, eval_steps=2,
                            save_steps=2, early_stopping_patience=3, lora_dropout=0.0, lr_scheduler_type="constant")
    done = tiny_run.moesaic("train", run)
    assert done.returncode == 0, done.stderr
    told = report(tmp_path / "out")
    stopped, best = told["steps"], told["best"]
    assert told["status"] == "stopped early" and stopped < 60 and told["weights_of"] == best["step"] < stopped
    why = (f"stopped at step {stopped}: eval_loss has not improved in 3 evaluations; the folder holds the weights of "
           f"step {best['step']}, where it was {best['value']:.4f}")
    assert why in done.stdout and told["message"] == why
    kept = (tmp_path / "out" / f"checkpoint-{best['step']}" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == kept


@pytest.mark.parametrize("changes, message", [
    ({"metric_for_best_model": "eval/rte/acc"}, "got 'eval/rte/acc', expected one of eval_loss"),
    ({"metric_for_best_model": "loss"}, "got 'loss', expected one of eval_loss"),
    ({"metric_for_best_model": "eval/quiz/acc", "early_stopping_patience": 2}, "needs eval.steps"),
])
def test_a_metric_that_is_not_measured_is_refused(tmp_path, changes, message):
    run = tiny_run.make_run(tmp_path, val_size=10, eval_steps=2, save_steps=2, **changes)
    for flags in [[], ["--dry-run"]]:
        done = tiny_run.moesaic("train", run, *flags)
        assert done.returncode == 2 and message in done.stderr, done.stderr


# --- compare ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    for name, changes in {"mix_s1": {"seed": 1}, "mix_s2": {"seed": 2}, "low": {"finetuning_type": "lora", "num_experts": None}
                          }.items():
        tiny_run.train(folder, name, val_size=10, eval_steps=4, logging_steps=2, **changes)
    return folder


def test_runs_that_differ_in_their_seed_are_one_row(runs, tmp_path):
    text = tiny_run.run("compare", runs / "mix_s1", runs / "mix_s2", runs / "low", "-o", tmp_path / "all")
    told = json.loads((tmp_path / "all.json").read_text())
    mix, low = told["comparison"]
    assert mix["name"] == "mix_s" and low["name"] == "low" and mix["seeds"] == [1, 2]
    assert told["keys"] == ["finetuning_type", "num_experts"]
    losses = [report(runs / name)["log"][-1]["eval_loss"] for name in ["mix_s1", "mix_s2"]]
    figure = mix["figures"]["eval_loss"]
    assert figure["values"] == losses and figure["n"] == 2
    assert figure["mean"] == pytest.approx(sum(losses) / 2)
    assert figure["std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert low["figures"]["eval_loss"]["std"] is None
    assert [step for step, _ in mix["curves"]["loss"]["points"]] == [2, 4, 6, 8]
    assert f"{figure['mean']:.4f} ± {figure['std']:.4f}" in text and "molora" in text
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert [row["name"] for row in rows] == ["mix_s", "low"] and rows[0]["finetuning_type"] == "molora"
    assert float(rows[0]["eval_loss"]) == figure["mean"] and rows[1]["eval_loss_std"] == ""
    assert page_data(tmp_path / "all.html") == told
    tiny_run.run("compare", runs / "mix_s1", runs / "low", "-o", tmp_path / "all")  # its own files may be replaced


def test_compare_says_what_it_can_not_read(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in [([runs / "low"], "expected at least two folders of runs"),
                               ([runs / "low", tmp_path / "empty"], "got no report.json in it"),
                               ([runs / "low", tmp_path / "nowhere"], "nowhere")]:
        done = tiny_run.moesaic("compare", *arguments, "-o", tmp_path / "c")
        assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not list(tmp_path.glob("c.*"))
    (tmp_path / "mine.csv").write_text("a,b\n")
    done = tiny_run.moesaic("compare", runs / "low", runs / "mix_s1", "-o", tmp_path / "mine")
    assert done.returncode == 2 and "nothing is overwritten" in done.stderr
    assert (tmp_path / "mine.csv").read_text() == "a,b\n" and not (tmp_path / "mine.json").exists()
