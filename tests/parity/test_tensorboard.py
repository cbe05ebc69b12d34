"""TensorBoard itself reads the event files."""

import json
import pathlib
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
import tiny_run  # noqa: E402


def test_scalars_equal_the_log(tmp_path):
    out = tmp_path / "out"
    run = tiny_run.make_run(tmp_path, output_dir=str(out), max_steps=12, logging_steps=3, val_size=0.2, eval_steps=6,
                            report_to=["jsonl", "tensorboard"])
    done = tiny_run.moesaic("train", run)
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    for tag, key in [("train/loss", "loss"), ("train/learning_rate", "learning_rate"), ("eval/eval_loss", "eval_loss")]:
        expected = [(row["step"], row[key]) for row in rows if key in row]
        assert len(expected) >= 2
        got = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in got] == [step for step, _ in expected]
        assert [value for _, value in got] == pytest.approx([value for _, value in expected], rel=1e-6)  # float32
