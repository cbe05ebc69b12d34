"""`moesaic demo` on a tiny model: its runs and figures, and that it goes on where it was stopped."""

import json
import signal
import subprocess
import time

import pytest
import yaml

from tiny_run import command, make_model, moesaic, run

STEPS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_model(folder / "model", max_position_embeddings=256)
    return folder


def arguments(folder, name, steps=STEPS):
    return ["demo", "--model", folder / "model", "--output_dir", folder / name, "--steps", steps, "--test_rows", 3]


@pytest.fixture(scope="module")
def whole(folder):
    return run(*arguments(folder, "whole"))


def test_shows_the_mixture_beside_a_lora_of_its_size(folder, whole):
    results = json.loads((folder / "whole" / "results.json").read_text())
    columns = results["columns"]
    assert list(columns) == ["base", "molora", "lora"]
    sizes = [columns[name]["trainable_parameters"] for name in ("molora", "lora")]
    assert 0.8 < sizes[1] / sizes[0] < 1.25
    for column in columns.values():
        assert column["trained"]["questions"] == 9 * 3 and column["never_trained"]["questions"] == 2 * 3
        assert all(len(answers) == 3 for answers in column["answers"].values())
    assert results["molora_minus_lora"]["trained"].keys() == {"value", "standard_error", "questions"}
    assert "3 questions per skill" in whole and "95 % interval" in whole
    page = (folder / "whole" / "README.md").read_text()
    assert page.split("```")[1].strip() in whole


def test_leaves_runs_as_train_does(folder, whole):
    for method in ["molora", "lora"]:
        out = folder / "whole" / method
        keys = yaml.safe_load((out / "run.yaml").read_text())
        assert keys["finetuning_type"] == method and keys["max_steps"] == STEPS
        assert (out / "README.md").read_text().startswith("---\nlibrary_name: moesaic")
    shared = ["dataset", "max_steps", "per_device_train_batch_size", "learning_rate", "seed"]
    molora, lora = (yaml.safe_load((folder / "whole" / each / "run.yaml").read_text()) for each in ("molora", "lora"))
    assert [molora[key] for key in shared] == [lora[key] for key in shared]
    assert not (folder / "whole" / "progress.json").exists()


def results(out):
    """What was trained and answered, without the times."""
    columns = json.loads((out / "results.json").read_text())["columns"]
    return ([(out / method / "adapter_model.safetensors").read_bytes() for method in ("molora", "lora")],
            {name: column["answers"] for name, column in columns.items()})


@pytest.mark.parametrize("method, end", [("molora", signal.SIGINT), ("lora", signal.SIGINT), ("lora", signal.SIGKILL)])
def test_goes_on_where_it_was_stopped(folder, whole, method, end):
    name = f"{method}-{end.name}"
    out = folder / name
    demo = subprocess.Popen(command(*arguments(folder, name)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True)
    while demo.poll() is None and not (out / method / "checkpoint-20").exists():
        time.sleep(0.002)
    demo.send_signal(end)
    _, said = demo.communicate()
    if end == signal.SIGINT:
        assert demo.returncode == 130 and f"of {method}; the same command goes on" in said
    assert (out / "progress.json").exists() and not (out / "results.json").exists()
    other = moesaic(*arguments(folder, name, steps=STEPS + 1))
    assert other.returncode == 2 and "unfinished demo of other settings" in other.stderr
    assert "Going on with the demo" in run(*arguments(folder, name))
    ours, theirs = (results(folder / each) for each in (name, "whole"))
    assert ours == theirs
