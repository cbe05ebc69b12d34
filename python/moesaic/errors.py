"""What goes wrong: messages say where, what came, what was expected."""

import functools
import re

import torch


class Error(RuntimeError):
    """Base of all errors that carry a message for a person."""


class UsageError(Error, ValueError):
    """A wrong argument, key or value."""


class DataError(Error, ValueError):
    """A file or data that is damaged or does not fit."""


class FormatError(DataError):
    """A file that breaks its own format."""


class ConfigError(DataError):
    """A configuration with impossible values."""


class ShapeError(DataError):
    """A tensor of the wrong shape or dtype."""


class Stopped(Error):
    """Work that was stopped before it had a result."""


KINDS = {kind.__name__: kind for kind in (UsageError, DataError, FormatError, ConfigError, ShapeError, Stopped)}
KINDS["OutOfMemoryError"] = torch.OutOfMemoryError


def of(error: RuntimeError) -> Exception:
    """The error that a RuntimeError of the C++ library stands for."""
    found = re.match(r"\[(\w+)\] (.*)", str(error), re.DOTALL)
    return KINDS[found[1]](found[2]) if found and found[1] in KINDS else error


def translated(function):
    """`function`, raising what `of` makes of its RuntimeErrors."""
    @functools.wraps(function)
    def call(*arguments, **options):
        try:
            return function(*arguments, **options)
        except RuntimeError as error:
            if isinstance(error, Error):
                raise
            told = of(error)
        raise told
    return call
