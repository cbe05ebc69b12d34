"""The folders of moesaic/ stand in the order data flows, and an #include only points back along it.

A folder may include itself and the folders that its moesaic_folder() line in CMakeLists.txt names. Those must stand
above it there, and `models` and `adapters` must never know each other. The program prints through one function.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = re.compile(r"^moesaic_folder\((\w+)\s+DEPS\s*([\w ]*?)\s*(?:LIBS.*)?\)", re.MULTILINE)
PRINTS = re.compile(r"std::(cout|cerr|clog)\b|\bfmt::print\b|\b(printf|puts|fputs|putchar)\(")
INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]')


def read_order(cmake_text):
    """folder -> folders it may include, in the order of the file."""
    return {name: set(deps.split()) for name, deps in FOLDER.findall(cmake_text)}


def order_problems(order):
    seen = set()
    for folder, deps in order.items():
        for dep in sorted(deps - seen):
            yield f"CMakeLists.txt: '{folder}' depends on '{dep}', which does not stand above it"
        seen.add(folder)
    if "adapters" in order["models"] or "models" in order["adapters"]:
        yield "CMakeLists.txt: 'models' and 'adapters' must not know each other"


def include_problems(order, folder, name, text):
    for number, line in enumerate(text.splitlines(), 1):
        match = INCLUDE.match(line)
        if not match:
            continue
        top, *rest = match.group(1).split("/")
        if top == "moesaic" and rest[0] != folder and rest[0] not in order[folder]:
            yield f"{name}:{number}: '{folder}' must not include '{rest[0]}'"
        elif top in {"cli", "demos", "tests", "bench"}:
            yield f"{name}:{number}: the library must not include {match.group(1)}"


def print_problems(name, text):
    """The program prints through cli/streams.h alone, which makes control characters visible."""
    for number, line in enumerate(text.splitlines(), 1):
        if PRINTS.search(line):
            yield f"{name}:{number}: prints past say() of cli/streams.h"


def self_test():
    """The checks find what they are for."""
    order = read_order("moesaic_folder(base DEPS LIBS x)\nmoesaic_folder(models DEPS base)\n"
                       "moesaic_folder(adapters DEPS base)\n")
    assert order == {"base": set(), "models": {"base"}, "adapters": {"base"}}
    assert not list(order_problems(order))
    assert not list(include_problems(order, "models", "m.cpp", '#include "moesaic/base/a.h"\n#include <vector>\n'))
    assert len(list(include_problems(order, "base", "b.h", '#include "moesaic/models/a.h"\n'))) == 1
    assert len(list(include_problems(order, "models", "m.cpp", '  # include "moesaic/adapters/a.h"\n'))) == 1
    assert len(list(include_problems(order, "base", "b.h", '#include "cli/command.h"\n'))) == 1
    assert len(list(print_problems("c.cpp", 'say("a");\nstd::cout << "b";\nfmt::print("c");\nputs("d");\n'))) == 3
    assert len(list(order_problems({"base": {"models"}, "models": set(), "adapters": {"models"}}))) == 2


def main():
    self_test()
    order = read_order((ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    problems = list(order_problems(order))
    files = [p for p in sorted((ROOT / "moesaic").rglob("*")) if p.suffix in {".h", ".cpp"}]
    for path in files:
        folder = path.relative_to(ROOT / "moesaic").parts[0]
        name = str(path.relative_to(ROOT))
        if folder in order:
            problems += include_problems(order, folder, name, path.read_text(encoding="utf-8"))
        else:
            problems.append(f"{name}: CMakeLists.txt has no moesaic_folder({folder} ...)")
    for path in sorted([*(ROOT / "cli").glob("*"), *(ROOT / "demos").glob("*")]):
        if path.stem != "streams":
            problems += print_problems(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    print("\n".join(problems) or f"{len(files)} files in {len(order)} folders: every include points back")
    return 1 if problems or not files else 0


if __name__ == "__main__":
    sys.exit(main())
