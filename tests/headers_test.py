"""Every public header compiles alone: with LibTorch's headers precompiled, but nothing of the project's own."""

import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = pathlib.Path(os.environ.get("MOESAIC_BUILD_DIR", ROOT / "build"))


def compiler_command():
    """The compiler and the flags that find headers, from how the build compiles the library."""
    for entry in json.loads((BUILD / "compile_commands.json").read_text()):
        if not entry["file"].endswith("moesaic/run/run.cpp"):
            continue
        words = shlex.split(entry["command"])
        program = next(word for word in words if re.search(r"(clang\+\+|g\+\+|c\+\+)[-\d.]*$", word))
        flags, i = [], 0
        while i < len(words):
            if words[i] in ("-isystem", "-idirafter", "-isystem-after"):
                flags += words[i:i + 2]
                i += 1
            elif re.match(r"-(I|D|std=|idirafter.|isystem.|isystem-after.)", words[i]):
                flags.append(words[i])
            i += 1
        return program, [*flags, "-fPIC", "-O0"]
    raise SystemExit("compile_commands.json does not name moesaic/run/run.cpp")


def main():
    program, flags = compiler_command()
    headers = sorted(ROOT.glob("moesaic/*/*.h"))
    with tempfile.TemporaryDirectory() as folder:
        torch = pathlib.Path(folder) / "torch.h"
        torch.write_text("#include <torch/torch.h>\n")
        precompiled = []
        if "clang" in program:
            instantiate = ["-fpch-instantiate-templates"]
            done = subprocess.run([program, *flags, *instantiate, "-x", "c++-header", torch, "-o", f"{torch}.pch"])
            assert done.returncode == 0
            precompiled = ["-include-pch", f"{torch}.pch"]

        def compiles(header):
            """'' or what the compiler says."""
            source = f'#include "{header.relative_to(ROOT)}"\n'
            before = precompiled if reaches_torch(header, set()) else []
            done = subprocess.run([program, *flags, *before, "-fsyntax-only", "-x", "c++", "-"], input=source,
                                  capture_output=True, text=True)
            return done.stderr if done.returncode else ""

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            said = list(pool.map(compiles, headers))
    problems = [f"{header.relative_to(ROOT)} does not compile alone:\n{text}" for header, text in zip(headers, said) if text]
    # The precompiled header hides a missing <torch/torch.h>.
    problems += [f"{header.relative_to(ROOT)}: uses tensors, but includes none of what declares them"
                 for header in headers if not includes_torch(header, set())]
    problems += installed_problems(headers)
    print("\n".join(problems) or f"{len(headers)} headers compile alone")
    return 1 if problems or not headers else 0


def installed_problems(headers):
    """An installed header includes only what is installed, too."""
    private = set(re.findall(r'PATTERN "(\w+\.h)" EXCLUDE', (ROOT / "cmake" / "Install.cmake").read_text()))
    for header in headers:
        if header.name in private:
            continue
        for name in re.findall(r'^#include "([^"]+)"', header.read_text(), re.MULTILINE):
            if not name.startswith("moesaic/") or pathlib.PurePath(name).name in private:
                yield f"{header.relative_to(ROOT)}: is installed, but {name} is not"


def includes_torch(header, seen):
    """True when it uses no tensors, or a header of LibTorch is among what it includes, directly or through ours."""
    text = header.read_text()
    return not re.search(r"\b(torch|at|c10)::", text) or reaches_torch(header, seen)


def reaches_torch(header, seen):
    seen.add(header)
    for name in re.findall(r'^#include ["<]([^">]+)[">]', header.read_text(), re.MULTILINE):
        if re.match(r"(torch|ATen|c10)/", name):
            return True
        own = ROOT / name
        if own.exists() and own not in seen and reaches_torch(own, seen):
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
