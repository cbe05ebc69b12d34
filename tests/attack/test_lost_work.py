"""What SECURITY.md promises of files: nothing lost, nothing overwritten, no figure that is none."""

import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

import tiny_run


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(*arguments, code=2):
    done = tiny_run.moesaic(*arguments)
    assert done.returncode == code, (arguments, done.returncode, done.stderr)
    return done.stderr


def spoil(file, name, place, number):
    tensors = safetensors.torch.load_file(file)
    tensors[name].view(-1)[place] = number
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with model/, an adapter of one expert (lora/), one of several (molora/) and a task."""
    folder = tmp_path_factory.mktemp("attack")
    tiny_run.train(folder, "lora", finetuning_type="lora", num_experts=None, max_steps=2)
    tiny_run.train(folder, "molora", max_steps=2)
    (folder / "task.jsonl").write_text('{"query": "red ", "choices": ["one", "two"], "gold": 0}\n' * 3)
    return folder


def copied(made, tmp_path, *names):
    for name in names:
        subprocess.run(["cp", "-r", made / name, tmp_path / name], check=True)
    return tmp_path


# --- a number that is not finite is no result

@pytest.mark.parametrize("weight, number, place", [
    ("model.norm.weight", float("nan"), "the final norm"),
    ("model.layers.1.mlp.up_proj.weight", float("inf"), "the output of layer 1"),
    ("model.embed_tokens.weight", float("nan"), "the input of layer 0"),
    ("lm_head.weight", float("nan"), "the head's weights"),
])
def test_figures_of_damaged_weights_are_refused(made, tmp_path, weight, number, place):
    copied(made, tmp_path, "model", "molora")
    model = tmp_path / "model"
    spoil(model / "model.safetensors", weight, 3 * 32 + 1 if "embed" in weight else 1, number)
    assert place in refused("score", "--model", model, "--ids", "0,3,4", "--json", code=3)
    ask = ["--model", model, "--tasks", made / "task.jsonl"]
    assert place in refused("eval", *ask, "--json", code=3)
    if weight != "lm_head.weight":  # routes ends before the head
        out = tmp_path / "page"
        assert place in refused("routes", *ask, "--adapter", made / "molora", "-o", out, code=3)
        assert not list(tmp_path.glob("page*"))


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_not_written(made, tmp_path, number):
    copied(made, tmp_path, "model", "lora")
    model, lora, out = tmp_path / "model", tmp_path / "lora", tmp_path / "out"
    bad = next(iter(safetensors.torch.load_file(lora / "adapter_model.safetensors")))
    spoil(lora / "adapter_model.safetensors", bad, 0, number)
    assert "not finite" in refused("merge", "--model", model, "--adapter", lora, out, code=3)
    refused("export", "--format", "peft", "--adapter", lora, out, code=3)
    spoil(model / "model.safetensors", "model.norm.weight", 5, number)
    assert "'model.norm.weight'" in refused("export", "--model", model, out, code=3)
    (tmp_path / "compose.yaml").write_text(json.dumps(
        {"anchor": str(model), "augmenting": str(made / "model"), "num_connections": 1, "output_dir": str(out)}))
    assert "norm.weight" in refused("compose", tmp_path / "compose.yaml", code=3)
    assert not out.exists() or not list(out.glob("*.safetensors"))


# --- the user's files are never overwritten

def test_no_verb_writes_over_a_folder_that_holds_something(made, tmp_path):
    copied(made, tmp_path, "model", "lora", "molora")
    (tmp_path / "link").symlink_to("model")
    before = contents(tmp_path)
    model, lora = tmp_path / "model", tmp_path / "lora"
    compose = made / "compose.yaml"
    compose.write_text(json.dumps({"anchor": str(model), "augmenting": str(made / "model"), "num_connections": 1,
                                   "output_dir": str(tmp_path / "link")}))
    refused("export", "--model", model, f"{tmp_path}/lora/../link/")
    refused("export", "--model", tmp_path / "link", model)
    refused("export", "--model", made / "model", lora)
    refused("export", "--format", "peft", "--adapter", lora, lora)
    refused("merge", "--model", model, "--adapter", lora, tmp_path / "link")
    refused("compose", compose)
    assert contents(tmp_path) == before


def test_no_run_writes_over_what_is_not_its_own(made, tmp_path):
    copied(made, tmp_path, "model", "lora")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    before = contents(tmp_path)
    run = tiny_run.make_run(made, output_dir=str(made / "never"), finetuning_type="full", num_experts=None,
                            lora_dropout=0.0, max_steps=2)
    overwrite, auto = ["overwrite_output_dir=true"], ["--resume", "auto"]
    for out, more in [("model", []), ("link", overwrite), ("model", auto), ("lora", []), ("lora", auto),
                      ("mine", overwrite)]:
        refused("train", run, f"model_name_or_path={tmp_path / 'model'}", f"output_dir={tmp_path / out}", *more)
    assert contents(tmp_path) == before


def test_a_run_that_replaces_another_leaves_nothing_of_its_kind(made, tmp_path):
    for kind, more in [("molora", {}), ("full", {"num_experts": None, "lora_dropout": 0.0}), ("lora", {"num_experts": None})]:
        run = tiny_run.make_run(made, output_dir=str(tmp_path / "out"), finetuning_type=kind, max_steps=2, save_steps=0,
                                overwrite_output_dir=True, **more)
        assert tiny_run.moesaic("train", run).returncode == 0
        left = {path.name for path in (tmp_path / "out").iterdir()}
        assert ("config.json" in left, "model.safetensors" in left) == (kind == "full",) * 2
        assert ("adapter_config.json" in left, "adapter_model.safetensors" in left) == (kind != "full",) * 2


def test_a_run_file_is_not_replaced_by_the_runs_own(made, tmp_path):
    (tmp_path / "run.yaml").write_text(tiny_run.make_run(made, output_dir=str(tmp_path)).read_text())
    before = contents(tmp_path)
    assert "run.yaml" in refused("train", tmp_path / "run.yaml")
    assert contents(tmp_path) == before


def test_reports_data_and_demos_replace_nothing_but_their_own(made, tmp_path):
    copied(made, tmp_path, "model", "molora")
    (tmp_path / "config.html").write_text("mine")
    (tmp_path / "table.csv").write_text("mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text("{}")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "results.json").write_text("{}")
    before = contents(tmp_path)
    routes = ["routes", "--model", tmp_path / "model", "--adapter", tmp_path / "molora", "--tasks", made / "task.jsonl"]
    for out in ["model/config", "config", "table"]:
        assert "nothing is overwritten" in refused(*routes, "-o", tmp_path / out)
    refused("data", "skills", tmp_path / "data", "--train_rows", "1", "--test_rows", "1")
    refused("data", "keys", tmp_path / "data", "--test_rows", "1")
    for folder in ["demo", "model"]:
        refused("demo", "--model", tmp_path / "model", "--output_dir", tmp_path / folder)
        refused("demo", "calm", "--output_dir", tmp_path / folder)
    now = contents(tmp_path)
    assert {file: now[file] for file in before} == before
    for _ in range(2):  # a report may be made again
        assert tiny_run.moesaic(*routes, "-o", tmp_path / "new").returncode == 0


# --- one run, one folder

def test_the_second_run_is_told_who_is_at_work(made):
    out = made / "busy"
    run = tiny_run.make_run(made, output_dir=str(out), max_steps=100000, save_steps=2)
    first = subprocess.Popen(tiny_run.command("train", run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (out / "checkpoint-2").exists():
        time.sleep(0.005)
    for more in [[], ["--resume", "auto"], ["overwrite_output_dir=true"]]:
        said = refused("train", run, *more)
        assert f"process {first.pid}" in said and "at work" in said
    first.kill()
    first.wait()
    assert tiny_run.moesaic("train", run, "--resume", "auto", "max_steps=4").returncode == 0  # no lock survives
    assert not list(out.glob("run.lock"))


# --- checkpoints are whole and known

def test_auto_passes_over_what_is_damaged(made):
    whole, out = made / "whole", made / "damaged"
    run = tiny_run.make_run(made, output_dir=str(whole), max_steps=10, save_steps=5)
    assert tiny_run.moesaic("train", run).returncode == 0
    run = tiny_run.make_run(made, output_dir=str(out), max_steps=10, save_steps=5)
    assert tiny_run.moesaic("train", run).returncode == 0
    damaged = out / "checkpoint-10" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    (out / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refused("train", run, "--resume", out / "checkpoint-10", code=3)
    done = tiny_run.moesaic("train", run, "--resume", "auto")
    assert done.returncode == 0 and "passed over" in done.stderr and "checkpoint-10" in done.stderr, done.stderr
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


# --- signals and ends

@pytest.mark.parametrize("stop", [signal.SIGHUP, signal.SIGUSR1])
def test_a_lost_terminal_loses_no_work(made, stop):
    out = made / stop.name
    run = tiny_run.make_run(made, output_dir=str(out), max_steps=100000, save_steps=0)
    process = subprocess.Popen(tiny_run.command("train", run, "logging_steps=1"), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(stop, signal.SIG_DFL))
    while process.poll() is None and not ((out / "train_log.jsonl").exists() and (out / "train_log.jsonl").read_text()):
        time.sleep(0.005)
    process.send_signal(stop)
    process.send_signal(stop)  # shells say it twice
    assert process.wait(60) == 130
    assert len(list(out.glob("checkpoint-*"))) == 1


def test_nohup_stays_deaf(made):
    out = made / "nohup"
    run = tiny_run.make_run(made, output_dir=str(out), max_steps=40, save_steps=0)
    process = subprocess.Popen(tiny_run.command("train", run, "logging_steps=1"), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    while process.poll() is None and not ((out / "train_log.jsonl").exists() and (out / "train_log.jsonl").read_text()):
        time.sleep(0.005)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0


@pytest.mark.parametrize("arguments", [
    ["score", "--model", "model", "--ids", "0,3", "--json"], ["eval", "--model", "model", "--tasks", "task.jsonl"],
    ["inspect", "model"], ["--help"]])
def test_a_full_disk_behind_standard_output_is_an_error(made, arguments):
    command = [str(tiny_run.PROGRAM), *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=made, timeout=60)
    assert done.returncode == 3 and "standard output" in done.stderr, (done.returncode, done.stderr)


def test_a_limit_on_files_is_an_error(made):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    done = tiny_run.moesaic("export", "--model", made / "model", made / "too_large", preexec_fn=limit)
    assert done.returncode == 3 and "File too large" in done.stderr, (done.returncode, done.stderr)


def test_closed_streams_let_no_log_into_another_file(made):
    out = made / "closed"
    run = tiny_run.make_run(made, output_dir=str(out), max_steps=6, eval_steps=1, val_size=4, logging_steps=1)
    start = "import os, sys\nfor d in (0, 1, 2): os.close(d)\nos.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", start, *tiny_run.command("train", run)], timeout=60)
    assert done.returncode == 0
    for log in ["train_log.jsonl", "router_stats.jsonl"]:
        for line in (out / log).read_text().splitlines():
            json.loads(line)


def test_what_a_dead_process_left_half_written_goes(made, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f"model.safetensors.moesaic-{dead.pid}.tmp"
    left.write_text("half")
    assert tiny_run.moesaic("export", "--model", made / "model", tmp_path).returncode == 0
    assert not left.exists()


# --- out of memory is exit 4

def test_limits_on_the_address_space_end_in_words(made):
    drawn = random.Random(7)
    for _ in range(8):
        limit = drawn.randint(380, 640) << 20
        preexec = lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        done = subprocess.run([tiny_run.PROGRAM, "score", "--model", made / "model", "--ids", "0,3,4"],
                              capture_output=True, text=True, preexec_fn=preexec, timeout=60,
                              env={**os.environ, "OMP_NUM_THREADS": "2"})
        # 127: not even the libraries could be loaded, and the loader says so. 3: the tokenizer ran out of it.
        assert done.returncode in (0, 3, 4, 127), (limit >> 20, done.returncode, done.stderr[-500:])
        assert done.returncode == 0 or done.stderr


CGROUP = pathlib.Path("/sys/fs/cgroup")


@pytest.fixture
def group():
    """A control group of 300 MB: (a function that enters it)."""
    v1 = (CGROUP / "memory" / "memory.limit_in_bytes").exists()
    path = CGROUP / ("memory" if v1 else "") / f"moesaic_test_{os.getpid()}"
    try:
        path.mkdir()
        (path / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(300 << 20))
    except OSError as reason:
        if path.exists():
            path.rmdir()
        pytest.skip(f"no control group can be made here: {reason}")
    yield lambda: (path / "cgroup.procs").write_text(str(os.getpid()))
    path.rmdir()


def test_a_limit_of_the_control_group_ends_in_words(made, group):
    arguments = ["score", "--model", made / "model", "--ids"]
    done = tiny_run.moesaic(*arguments, "0,3,4", preexec_fn=group)
    assert done.returncode == 0, done.stderr
    tiny_run.make_model(made / "large", hidden_size=2048, intermediate_size=8192, num_hidden_layers=4)
    done = tiny_run.moesaic("merge", "--model", made / "large", "--adapter", made / "lora", made / "never", preexec_fn=group)
    assert done.returncode in (2, 3), done.stderr
    run = tiny_run.make_run(made, output_dir=str(made / "grouped"), max_steps=2)
    done = tiny_run.moesaic("train", run, f"model_name_or_path={made / 'large'}", "per_device_train_batch_size=64",
                            preexec_fn=group)
    assert done.returncode == 4 and "memory" in done.stderr, (done.returncode, done.stderr[-500:])


@pytest.mark.parametrize("key", ["per_device_train_batch_size", "gradient_accumulation_steps", "max_batch_tokens",
                                 "max_steps", "num_train_epochs", "num_experts", "lora_rank"])
def test_absurd_sizes_of_a_run_are_refused_at_once(made, key):
    run = tiny_run.make_run(made, output_dir=str(made / "absurd"), max_steps=-1 if key == "num_train_epochs" else 2)
    said = refused("train", run, f"{key}={10**18}")
    assert key.removeprefix("lora_") in said
    assert not (made / "absurd").exists()


@pytest.mark.parametrize("arguments, key", [
    (["score", "--ids", "0,3", "--threads", "4096"], "--threads"),
    (["eval", "--tasks", "task.jsonl", "--batch_size", str(10**18)], "--batch_size"),
    (["generate", "-p", "red", "--max_new_tokens", str(10**18)], "--max_new_tokens")])
def test_absurd_sizes_of_a_verb_are_refused_at_once(made, arguments, key):
    done = subprocess.run([tiny_run.PROGRAM, arguments[0], "--model", "model", *arguments[1:]], cwd=made, timeout=20,
                          capture_output=True, text=True)
    assert done.returncode == 2 and key in done.stderr
