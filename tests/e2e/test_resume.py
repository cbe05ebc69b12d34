"""`moesaic train`: killed at any moment it loses nothing, and goes on bit for bit where its last checkpoint stands."""

import json
import random
import shlex
import signal
import subprocess
import time

import pytest

import tiny_run


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing disturbs: its folder, and the bytes of its adapter."""
    folder = tmp_path_factory.mktemp("train")
    done = tiny_run.moesaic("train", tiny_run.make_run(folder, output_dir=str(folder / "straight")))
    assert done.returncode == 0, done.stderr
    return folder, (folder / "straight" / "adapter_model.safetensors").read_bytes()


def checkpoints(out):
    return sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))


def losses(out):
    state = json.loads((out / "trainer_state.json").read_text())
    return [(row["step"], row["loss"]) for row in state["log_history"] if "loss" in row]


def test_writes_the_whole_output_folder(straight):
    out = straight[0] / "straight"
    for name in ["adapter_config.json", "tokenizer.json", "tokenizer_config.json", "run.yaml", "trainer_state.json",
                 "train_log.jsonl", "router_stats.jsonl", "README.md"]:
        assert (out / name).stat().st_size > 0, name
    assert checkpoints(out) == [55, 60]  # save_total_limit 2
    # The frozen head is random and small (0.02), so its logits can only leave the uniform log 13 by a few tenths.
    assert losses(out)[-1][1] < losses(out)[0][1] - 0.15


def test_the_same_run_again_is_the_same(straight):
    folder, adapter = straight
    assert tiny_run.moesaic("train", tiny_run.make_run(folder, output_dir=str(folder / "again"))).returncode == 0
    assert (folder / "again" / "adapter_model.safetensors").read_bytes() == adapter


def test_kill_9_again_and_again(straight):
    folder, adapter = straight
    out = folder / "killed"
    run = tiny_run.make_run(folder, output_dir=str(out))
    rng = random.Random(4)
    kills = 0
    for _ in range(40):
        process = subprocess.Popen(tiny_run.command("train", run, "--resume", "auto"), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        before = checkpoints(out)[-1:] if out.exists() else []
        # Wait for progress, then strike a little later: in a step, or while a checkpoint is written.
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if out.exists() and checkpoints(out)[-1:] != before:
                break
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    process.wait()
    assert process.returncode == 0
    assert kills >= 3
    assert (out / "adapter_model.safetensors").read_bytes() == adapter
    assert losses(out) == losses(folder / "straight")
    steps = [json.loads(line)["step"] for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert not list(out.glob(".*"))  # nothing half written is left


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_says_how_to_go_on(straight, stop):
    folder, adapter = straight
    out = folder / f"interrupted_{stop.name}"
    run = tiny_run.make_run(folder, output_dir=str(out), save_steps=0)
    process = subprocess.Popen(tiny_run.command("train", run, "logging_steps=4", "report_to=[jsonl, none]"),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out / "train_log.jsonl").exists():
        time.sleep(0.001)
    while process.poll() is None and not (out / "train_log.jsonl").read_text():
        time.sleep(0.001)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert len(checkpoints(out)) == 1
    words = shlex.split(errors.split("go on with:\n")[1])  # as a shell reads what it says
    assert words[:2] == ["moesaic", "train"] and words[-2:] == ["--resume", "auto"]
    assert words[words.index("--device") + 1] == "cpu"  # what the flags said holds for the rest, too
    assert subprocess.run([tiny_run.PROGRAM, *words[1:], "--threads", "1"], capture_output=True).returncode == 0
    assert (out / "adapter_model.safetensors").read_bytes() == adapter


def test_dry_run_counts_and_estimates(straight):
    folder, _ = straight
    done = tiny_run.moesaic("train", tiny_run.make_run(folder, output_dir=str(folder / "dry")), "--dry-run")
    assert done.returncode == 0, done.stderr
    # Per layer, E = 3, r = 2: sum over linears of E (r (in + out) + in).
    widths = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    expected = 2 * sum(3 * (2 * (i + o) + i) for i, o in widths)
    assert f"trainable  {expected} " in done.stdout
    assert "q_proj 2" in done.stdout and "down_proj 2" in done.stdout
    assert "memory" in done.stdout and "optimizer state" in done.stdout
    assert not (folder / "dry").exists()


@pytest.mark.parametrize("method", [*tiny_run.METHODS, "full"])
def test_every_method_trains(straight, method):
    folder, _ = straight
    out = folder / method
    run = tiny_run.make_run(folder, output_dir=str(out), finetuning_type=method, num_experts=None, max_steps=20,
                            lora_dropout=0.0, learning_rate=1e-2, val_size=0.1, eval_steps=10, save_steps=10)
    done = tiny_run.moesaic("train", run)
    assert done.returncode == 0, done.stderr
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    evaluations = [row["eval_loss"] for row in history if "eval_loss" in row]
    assert len(evaluations) == 2 and evaluations[1] < evaluations[0]
    assert (out / ("model.safetensors" if method == "full" else "adapter_model.safetensors")).exists()


@pytest.mark.parametrize("changes, code, message", [
    ({"lora_rnk": 4}, 2, "lora_rank"),
    ({"optim": "sgd"}, 2, "expected adamw or adafactor"),
    ({"lora_target": ["q_prj"]}, 2, "q_proj"),
    ({"fp16": True}, 2, "bf16"),
    ({"dataset": ["nowhere.jsonl"]}, 2, "nowhere.jsonl"),
    ({"model_name_or_path": "/nowhere"}, 3, "/nowhere"),
    ({"eval_steps": 2}, 2, "val_size"),
])
def test_mistakes_are_named(straight, changes, code, message):
    folder, _ = straight
    done = tiny_run.moesaic("train", tiny_run.make_run(folder, **{"output_dir": str(folder / "wrong"), **changes}))
    assert done.returncode == code, done.stderr
    assert message in done.stderr


def test_a_damaged_checkpoint_is_refused(straight):
    folder, _ = straight
    out = folder / "damaged"
    run = tiny_run.make_run(folder, output_dir=str(out), max_steps=10)
    assert tiny_run.moesaic("train", run).returncode == 0
    state = out / "checkpoint-10" / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:-7])
    done = tiny_run.moesaic("train", run, "max_steps=12", "--resume", out / "checkpoint-10")
    assert done.returncode == 3
    assert "optimizer.safetensors" in done.stderr
