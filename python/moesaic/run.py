"""Runs: what `moesaic train` does, from Python."""

import contextlib
import hashlib
import os
import pathlib
import tempfile
from typing import Any, Mapping

from moesaic import bars
from moesaic._native import Job, classes, dumps, operators, refuse_copies
from moesaic.errors import UsageError, translated
from moesaic.model import Model, Table, load


def train(run: Mapping[str, Any] | str | os.PathLike, *, wait: bool = True, show: bool = True, **keys) -> "Run":
    """Trains an adapter, the connections of a composition, or a model.

    run: the keys of a run file (docs/config.md), or the path of one; `keys` win over them. A data set may be rows held in
    Python, a list of dicts or a `datasets.Dataset`: {"rows": rows}, with the other keys of a data set beside it; they are
    written into output_dir, so that its run.yaml can be run again. wait: returns when it is done, else at once (keep the
    Run: one that nobody holds is stopped); an interrupt finishes
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
    translated(operators.compose)(dumps(dict(keys)), device, dtype, seed)
    return load(keys["output_dir"], device=device, dtype=dtype)


def _open(run, keys, dry):
    written = []  # files of rows, which go again when there is no run
    own = {**run, **keys} if isinstance(run, Mapping) else dict(keys)
    with tempfile.TemporaryDirectory() as nowhere:
        folder = nowhere if dry else own.get("output_dir")
        for key in ("dataset", "eval_dataset"):
            if key in own:
                own[key] = _with_files(own[key], folder, written)
        try:
            if isinstance(run, Mapping):
                return translated(classes.Training)(dumps(own), "", [], dry)
            return translated(classes.Training)("", os.fspath(run), [f"{key}={dumps(value)}" for key, value in own.items()], dry)
        except BaseException:
            for file in written:
                file.unlink()
                with contextlib.suppress(OSError):  # it holds more
                    file.parent.rmdir()
            raise


def _with_files(datasets, folder, written):
    """`datasets` with rows written to files of `folder`."""
    if isinstance(datasets, (list, tuple)):
        return [_with_files(each, folder, written) for each in datasets]
    if not isinstance(datasets, Mapping) or "rows" not in datasets:
        return datasets
    if folder is None:
        raise UsageError("rows: got no output_dir, expected the folder that keeps them")
    if "name" in datasets:
        raise UsageError(f"rows: got the name {datasets['name']!r} beside them, expected none: they are the data set")
    text = "".join(dumps(row) + "\n" for row in datasets["rows"])
    file = pathlib.Path(folder) / f"rows-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(text)
        unfinished.replace(file)
        written.append(file)
    return {"name": str(file.resolve()), **{key: value for key, value in datasets.items() if key != "rows"}}


class Run:
    """A run, on a thread of its own from its making on; it is stopped where nobody holds it any more.

    Attributes: output_dir; plan, a text; history, a row per step (step, loss, learning_rate, grad_norm,
    tokens_per_second, ...); log, the rows of train_log.jsonl; step and loss, the last row's; status: running, finished,
    stopped early, interrupted or failed; result, when it is over: steps, train_loss, best, seconds, tokens.
    """

    def __init__(self, native):
        self.output_dir, self.plan = pathlib.Path(native.output_dir()), native.plan()
        self._history, self._log, self._status, self._result, self._error = Table(), [], "running", None, None
        self._job = Job(translated(native.start)())

    def __reduce__(self):
        refuse_copies("run")

    def __repr__(self):
        status, history = self.status, self.history
        last = f", step {history[-1]['step']}, loss {history[-1]['loss']:.4f}" if history else ""
        return f"<moesaic run {self.output_dir}: {status}{last}>"

    def _settle(self, seconds=0.0):
        """Takes what was told, and what came of the run where it is over; whether it is."""
        over = self._status != "running" or self._job.wait(seconds)
        for row in self._job.take():
            if "row" in row:
                self._log.append(row["row"])
            else:
                self._history.append(row)
        if over and self._status == "running":
            try:
                result = self._job.result()
            except Exception as error:
                self._status, self._error = "failed", error
            else:
                ends = {"interrupted": result.pop("interrupted"), "stopped early": result.pop("stopped_early")}
                self._result = result
                self._status = next((status for status, is_so in ends.items() if is_so), "finished")
        return over

    @property
    def status(self) -> str:
        self._settle()
        return self._status

    @property
    def history(self) -> Table:
        self._settle()
        return self._history

    @property
    def log(self) -> list[dict]:
        self._settle()
        return self._log

    @property
    def result(self) -> dict | None:
        self._settle()
        return self._result

    @property
    def step(self) -> int:
        return self.history[-1]["step"] if self.history else 0

    @property
    def loss(self) -> float | None:
        return self.history[-1]["loss"] if self.history else None

    def frame(self):
        """The history as a pandas DataFrame."""
        return self.history.frame()

    def stop(self) -> None:
        """Finishes the step, saves it and ends; `wait` waits for that."""
        self._job.stop()

    def wait(self, show: bool = True) -> "Run":
        """Until it is over; with a bar. Raises what the run raised."""
        bar, over = None, False
        while not over:
            try:
                over = self._settle(0.05)
                if self._history:
                    row = self._history[-1]
                    bar = bar or bars.bar("train", row["max_steps"], show)
                    bar.update(row["step"], f"loss {row['loss']:.4f}, {row['tokens_per_second']:.0f} tokens/s")
            except KeyboardInterrupt:
                self.stop()
        if bar:
            bar.close()
        if self._error:
            raise self._error
        return self

    def model(self, **options) -> Model:
        """The trained result, opened: `load(output_dir, ...)`."""
        return load(self.output_dir, **options)
