"""The command `moesaic`: the program that the wheel brings, in place of Python."""

import os
import pathlib
import sys


def main():
    program = pathlib.Path(__file__).parent / "bin" / "moesaic"
    os.execv(program, [str(program), *sys.argv[1:]])
