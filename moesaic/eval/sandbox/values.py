# What both processes say to each other: one line of JSON a message. Data goes by value, everything else by its number
# in the process that has it. Put before program.py and tests.py.
import builtins
import collections
import decimal
import fractions
import json
import numbers
import os
import sys

getattr(sys, "set_int_max_str_digits", lambda digits: None)(0)


def packed(value, other):
    """JSON of `value`; `other` makes a dict of what is no data."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if isinstance(value, (collections.OrderedDict, collections.Counter, collections.defaultdict)) or kind is dict:
        return {"dict": [[packed(k, other), packed(v, other)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [packed(each, other) for each in value]}
    for name in ("list", "set", "frozenset", "deque"):
        if kind is KINDS[name]:
            return {name: [packed(each, other) for each in value]}
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is decimal.Decimal:
        return {"Decimal": str(value)}
    if kind is fractions.Fraction:
        return {"Fraction": [value.numerator, value.denominator]}
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return {"type": value.__name__}
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return other(value)


KINDS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}


def unpacked(value, other):
    """The value of `packed`; `other` makes a value of a dict that is no data."""
    if not isinstance(value, dict):
        return value
    (name, inner), = value.items()
    if name in KINDS:
        return KINDS[name](unpacked(each, other) for each in inner)
    if name == "dict":
        return {unpacked(k, other): unpacked(v, other) for k, v in inner}
    if name in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[name].fromhex(inner)
    if name == "type":
        kind = getattr(builtins, inner)
        return kind if isinstance(kind, type) else None
    if name == "range":
        return range(*inner)
    if name == "complex":
        return complex(*inner)
    if name == "Decimal":
        return decimal.Decimal(inner)
    if name == "Fraction":
        return fractions.Fraction(*inner)
    return other(value)


def changeable(what, arguments):
    """The lists, dicts and sets among the arguments of a call, which it may change."""
    return [each for each in arguments[1] if type(each) in (list, dict, set)] if what == "call" else []


class Line:
    """A pair of pipes."""

    def __init__(self, read, write):
        self.read, self.write = os.fdopen(read, "rb"), os.fdopen(write, "wb")

    def send(self, message):
        self.write.write(json.dumps(message).encode() + b"\n")
        self.write.flush()

    def receive(self):
        line = self.read.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the other side is gone")
        return json.loads(line)
