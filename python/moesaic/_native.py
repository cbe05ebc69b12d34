"""The C++ library, loaded once, beside the libtorch that `import torch` brought."""

import atexit
import json
import os
import pathlib
import weakref

import torch

from moesaic.errors import UsageError, translated

FOLDER = pathlib.Path(os.environ.get("MOESAIC_PYTHON_LIBRARY", pathlib.Path(__file__).parent / "lib"))


def _load():
    wanted, got = "2.11.", torch.__version__
    if not got.startswith(wanted):
        raise ImportError(f"moesaic: got torch {got}, expected {wanted}x, with whose headers it was built")
    library = FOLDER / "libmoesaic_python.so"
    if not library.exists():
        raise ImportError(f"moesaic: {library} is missing: this is a source tree, expected an installed wheel "
                          "(`make wheel`); moesaic.hf works without it")
    torch.ops.load_library(library)
    return torch.classes.moesaic


classes = _load()
operators = torch.ops.moesaic
operators.set_log_level("warning")
_jobs = weakref.WeakSet()


@translated
def set_log_level(level: str) -> None:
    """What the library says on stderr: trace, debug, info, warning (the default), error or off."""
    operators.set_log_level(level)


@translated
def routes_page(routes: dict) -> str:
    return operators.routes_page(json.dumps(routes))


def dumps(value) -> str:
    """`value` as JSON; paths are strings, and what JSON has no word for (NaN, objects) is a UsageError."""
    try:
        return json.dumps(value, default=os.fspath, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise UsageError(f"got {value!r}, expected numbers, texts, lists and dicts: {error}") from None


class Job:
    """Long work on a thread of the library."""

    def __init__(self, native):
        self._native = native
        _jobs.add(self)

    def __del__(self):  # here, and not in the native destructor, which would keep Python from running
        self.finish()

    def finish(self):
        """Stops the work and waits for its end."""
        self.stop()
        while not self._native.wait(0.05):
            pass

    @translated
    def wait(self, seconds):
        return self._native.wait(seconds)

    def take(self):
        return [json.loads(line) for line in self._native.take()]

    def stop(self):
        self._native.stop()

    @translated
    def result(self):
        return json.loads(self._native.result())

    def told(self):
        """Yields what is told until the work is done; stops the work where nobody wants the rest, or at an interrupt."""
        done = False
        try:
            while not done:
                done = self.wait(0.05)
                yield from self.take()
        finally:
            if not done:
                self.finish()

    def follow(self, watch=lambda row: None):
        for row in self.told():
            watch(row)
        return self.result()


def _stop_all():
    for job in list(_jobs):
        job.finish()


atexit.register(_stop_all)


class Native:
    """A torch custom class whose errors are ours."""

    def __init__(self, native):
        self._native = native

    def __getattr__(self, name):
        return translated(getattr(self._native, name))


def refuse_copies(of):
    raise UsageError(f"a {of} lives in the C++ library and can't be copied or pickled; save it to a folder and load that")
