"""Runs: what `moesaic train` does, from Python."""

import hashlib
import json
import os
import pathlib
from typing import Any, Mapping

from moesaic import bars
from moesaic._native import Job, classes, operators, refuse_copies
from moesaic.errors import UsageError, translated
from moesaic.model import Model, Table, load


def train(run: Mapping[str, Any] | str | os.PathLike, *, wait: bool = True, show: bool = True, **keys) -> "Run":
    """Trains an adapter, the connections of a composition, or a model.

    run: the keys of a run file (docs/config.md), or the path of one; `keys` win over them. A data set may be rows held in
    Python, a list of dicts or a `datasets.Dataset`: {"rows": rows}, with the other keys of a data set beside it; they are
    written into output_dir, so that its run.yaml can be run again. wait: returns when it is done; an interrupt finishes
    the step, saves it and returns a run whose status is "interrupted" (resume_from_checkpoint="auto" goes on with it).
    Raises UsageError for keys and values that can't be, DataError for data that doesn't fit.
    """
    started = Run(_open(run, keys, dry=False))
    return started.wait(show=show) if wait else started


def plan(run: Mapping[str, Any] | str | os.PathLike, **keys) -> str:
    """What `train` would do and the memory it needs; reads every row and trains nothing."""
    return _open(run, keys, dry=True).plan()


def compose(keys: Mapping[str, Any], *, device: str = "auto", dtype: str = "auto", seed: int = 42) -> Model:
    """Joins frozen models with new connections, as `moesaic compose` does, and opens the composition.

    keys: anchor, augmenting, output_dir, num_connections, align, ... (docs/cli.md). It is its anchor until a run with
    finetuning_type "calm" and its folder as model_name_or_path trains the connections.
    """
    translated(operators.compose)(json.dumps(dict(keys), default=os.fspath), device, dtype, seed)
    return load(keys["output_dir"], device=device, dtype=dtype)


def _open(run, keys, dry):
    if not isinstance(run, Mapping):
        words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]
        return translated(classes.Training)("", os.fspath(run), words, dry)
    run = {**run, **keys}
    for key in ("dataset", "eval_dataset"):
        if key in run:
            run[key] = _with_files(run[key], run.get("output_dir"))
    return translated(classes.Training)(json.dumps(run, default=os.fspath), "", [], dry)


def _with_files(datasets, output_dir):
    """`datasets` with rows written to files."""
    if isinstance(datasets, (list, tuple)):
        return [_with_files(each, output_dir) for each in datasets]
    if not isinstance(datasets, Mapping) or "rows" not in datasets:
        return datasets
    if output_dir is None:
        raise UsageError("rows: got no output_dir, expected the folder that keeps them")
    if "name" in datasets:
        raise UsageError(f"rows: got the name {datasets['name']!r} beside them, expected none: they are the data set")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in datasets["rows"])
    file = pathlib.Path(output_dir) / f"rows-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(text)
        unfinished.replace(file)
    return {"name": str(file.resolve()), **{key: value for key, value in datasets.items() if key != "rows"}}


class Run:
    """A run, on a thread of its own from its making on.

    Attributes: output_dir; plan, a text; history, a row per step (step, loss, learning_rate, grad_norm,
    tokens_per_second, ...); log, the rows of train_log.jsonl; status: running, finished, stopped early, interrupted or
    failed; result, when it is over: steps, train_loss, best, seconds, tokens.
    """

    def __init__(self, native):
        self.output_dir, self.plan = pathlib.Path(native.output_dir()), native.plan()
        self.history, self.log, self.status, self.result = Table(), [], "running", None
        self._job = Job(translated(native.start)())

    def __reduce__(self):
        refuse_copies("run")

    def __repr__(self):
        step, loss = self.step, self.loss
        return f"<moesaic run {self.output_dir}: {self.status}{f', step {step}, loss {loss:.4f}' if self.history else ''}>"

    def _take(self):
        for row in self._job.take():
            if "row" in row:
                self.log.append(row["row"])
            else:
                self.history.append(row)

    @property
    def step(self) -> int:
        self._take()
        return self.history[-1]["step"] if self.history else 0

    @property
    def loss(self) -> float | None:
        self._take()
        return self.history[-1]["loss"] if self.history else None

    def frame(self):
        """The history as a pandas DataFrame."""
        self._take()
        return self.history.frame()

    def stop(self) -> None:
        """Finishes the step, saves it and ends; `wait` waits for that."""
        self._job.stop()

    def wait(self, show: bool = True) -> "Run":
        """Until it is over; with a bar. Raises what the run raised."""
        if self.status != "running":
            return self
        bar, ended = None, False
        try:
            while not ended:
                try:
                    ended = self._job.wait(0.05)
                except KeyboardInterrupt:
                    self.stop()
                self._take()
                if self.history:
                    row = self.history[-1]
                    bar = bar or bars.bar("train", row["max_steps"], show)
                    bar.update(row["step"], f"loss {row['loss']:.4f}, {row['tokens_per_second']:.0f} tokens/s")
        finally:
            if bar:
                bar.close()
        try:
            self.result = self._job.result()
        except Exception:
            self.status = "failed"
            raise
        self.status = "interrupted" if self.result.pop("interrupted") else \
            "stopped early" if self.result.pop("stopped_early") else "finished"
        self.result.pop("stopped_early", None)
        return self

    def model(self, **options) -> Model:
        """The trained result, opened: `load(output_dir, ...)`."""
        return load(self.output_dir, **options)
