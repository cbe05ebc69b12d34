"""`moesaic study`: a grid of real runs, chosen, resumed and told of in one page."""

import json
import signal
import subprocess
import time

import pytest
import yaml

import tiny_run
from test_reports import page_data


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study file of two methods, two rates and two seeds, and what running it printed."""
    folder = tmp_path_factory.mktemp("study")
    keys = yaml.safe_load(tiny_run.make_run(folder, initializer_range=0.3).read_text())
    for key in ["output_dir", "finetuning_type", "num_experts", "learning_rate", "lora_dropout"]:
        keys.pop(key)
    quiz = [{"inputs": f"{a} {b} ", "answer_choices": [f"{b} {a} {a}", f"{a} {a} {a}"], "target": f"{b} {a} {a}"}
            for a in tiny_run.WORDS[:4] for b in tiny_run.WORDS[4:8]]
    for name, part in {"seen": quiz[:8], "other": quiz[8:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "forgetting.jsonl").write_text("".join(
        json.dumps({"inputs": "is not ", "targets": f"{word} {word}"}) + "\n" for word in tiny_run.WORDS))
    (folder / "dataset_info.json").write_text(json.dumps({"forgetting": {"file_name": "forgetting.jsonl"}}))
    keys.update(max_steps=16, save_steps=8, eval_steps=8, val_size=0.2, eval_on_start=True,
                dataset_dir=str(folder), eval_dataset=["forgetting"],
                eval={"tasks": [str(folder / "seen.jsonl"), str(folder / "other.jsonl")]})
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({
        "output_dir": str(folder / "out"), "run": keys,
        "methods": {"lora": {"finetuning_type": "lora"}, "molora": {"finetuning_type": "molora", "num_experts": 3}},
        "sweep": {"learning_rate": [1e-5, 3e-2]}, "seeds": [1, 2], "means": {"all tasks": ["eval/*/acc"]}}))
    return path, folder / "out", tiny_run.moesaic("study", path)


def test_a_study_is_run_and_told(study):
    _, out, done = study
    assert done.returncode == 0, done.stderr
    assert "molora: learning_rate=0.03" in done.stdout and "run 6 of 6" in done.stdout
    told = json.loads((out / "study.json").read_text())
    assert [group["name"] for group in told["comparison"]] == ["before training", "lora", "molora"]
    base, *methods = told["comparison"]
    assert base["figures"]["all tasks"]["n"] == 1 and base["figures"]["eval_forgetting_loss"]["mean"] > 0
    for group in methods:
        assert group["status"] == {"finished": 2} and group["seeds"] == [1, 2]
        assert group["figures"]["all tasks"]["n"] == 2
    row = told["study"]["rows"][1]
    assert row["choice"] == "learning_rate=0.03" and row["runs"] == [f"molora, learning_rate=0.03, seed={s}" for s in (1, 2)]
    assert row["sweep"]["learning_rate=0.03"] < row["sweep"]["learning_rate=1e-05"]
    assert 0 <= methods[1]["figures"]["eval/routing/task_information"]["mean"] <= 1
    assert "eval/routing/task_information" not in methods[0]["figures"]
    assert page_data(out / "study.html")["comparison"] == told["comparison"]
    result = json.loads((out / "results" / "lora,seed=1.json").read_text())
    assert result["train_info"]["status"] == "success" and result["run_info"]["peft_config"]["peft_type"] == "LORA"
    last = result["train_info"]["metrics"][-1]
    assert last["test accuracy"] == pytest.approx(methods[0]["figures"]["all tasks"]["values"][0])
    assert last["forgetting"] == pytest.approx(methods[0]["figures"]["eval_forgetting_loss"]["values"][0]
                                               - base["figures"]["eval_forgetting_loss"]["mean"])
    assert result["train_info"]["num_trainable_params"] == methods[0]["figures"]["trainable"]["mean"]


def test_what_is_done_is_not_done_again(study):
    path, out, _ = study
    before = (out / "lora" / "learning_rate=0.03" / "seed=2" / "report.json").stat().st_mtime_ns
    again = tiny_run.moesaic("study", path)
    assert again.returncode == 0 and "run 1" not in again.stdout
    assert (out / "lora" / "learning_rate=0.03" / "seed=2" / "report.json").stat().st_mtime_ns == before
    other = tiny_run.moesaic("study", path, "run.max_steps=17")
    assert other.returncode == 2 and "seed=1.yaml" in other.stderr


def test_a_study_stops_when_asked_and_goes_on(study, tmp_path):
    path, _, _ = study
    long = ["study", path, f"output_dir={tmp_path / 'out'}", "run.max_steps=400", "run.save_steps=10", "sweep={}",
            "run.learning_rate=0.01", "seeds=[1]", "methods={lora: {finetuning_type: lora}}"]
    process = subprocess.Popen(tiny_run.command(*long), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "out" / "lora" / "seed=1"
    deadline = time.monotonic() + 60
    while not list(folder.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, process.stderr.read()
    assert json.loads((folder / "report.json").read_text())["status"] == "interrupted"
    done = tiny_run.moesaic(*long)
    assert done.returncode == 0 and "resumed from" in done.stderr, done.stderr
    assert json.loads((folder / "report.json").read_text())["steps"] == 400


def test_a_failing_run_does_not_end_a_study(study, tmp_path):
    path, _, _ = study
    done = tiny_run.moesaic("study", path, f"output_dir={tmp_path / 'out'}", "sweep={}", "seeds=[1]",
                            "methods={bad: {finetuning_type: lora, learning_rate: 1.0e+30}, lora: {finetuning_type: lora}}")
    assert done.returncode == 3 and "failed: bad, seed=1" in done.stderr, done.stderr
    told = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [group["name"] for group in told["comparison"]] == ["before training", "lora"]
    assert told["study"]["failed"] == ["bad, seed=1"]
