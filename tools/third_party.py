"""Licences of what `make dist` ships beside our own code: THIRD_PARTY.md, and their texts.

usage: tools/third_party.py            writes THIRD_PARTY.md again
       tools/third_party.py --check    only says whether it is what Cargo.lock and the list below say
       tools/third_party.py --texts D  writes the texts into the new folder D, a folder each
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "THIRD_PARTY.md"
# (name, licence, what of it is there, where its texts lie: globs of the system, of this tree, or below .venv's
# site-packages)
LIBRARIES = [
    ("LibTorch 2.11.0", "BSD-3-Clause", "`libtorch_cpu`, `libc10`; in them oneDNN (Apache-2.0), Gloo (BSD-3-Clause) and others that its "
     "NOTICE and LICENSE list, and oneMKL (Intel Simplified Software License)", "torch-2.11.0.dist-info/licenses/*"),
    ("CUDA runtime and CUPTI 13.0", "NVIDIA's CUDA EULA", "`libcudart`, `libcupti`, which `libtorch_cpu` links to",
     "nvidia_cuda_[cr]u*-13.0.*.dist-info/licenses/*"),
    ("Apache Arrow 21.0.0", "Apache-2.0", "`libarrow`, `libparquet`", "pyarrow-21.0.0.dist-info/*E.txt"),
    ("spdlog", "MIT", "`libspdlog`", "/usr/share/doc/libspdlog1*/copyright"),
    ("fmt", "MIT", "`libfmt`", "/usr/share/doc/libfmt[0-9]*/copyright"),
    ("yaml-cpp", "MIT", "`libyaml-cpp`", "/usr/share/doc/libyaml-cpp0*/copyright"),
    ("GCC's OpenMP library", "GPL-3.0 with the GCC Runtime Library Exception", "`libgomp`, as the torch wheel has it",
     "/usr/share/doc/libstdc++6/copyright"),
    ("nlohmann-json", "MIT", "compiled in", "/usr/share/doc/nlohmann-json3-dev/copyright"),
    ("CLI11", "BSD-3-Clause", "compiled in", "/usr/share/doc/libcli11-dev/copyright"),
    ("uPlot", "MIT", "in the pages", "tools/licenses/uPlot.txt"),
]


def crates():
    """[(name, version, licence, folder)] of the crates that the bridge is built of on Linux."""
    cargo = shutil.which("cargo", path=os.pathsep.join([
        os.environ["PATH"], os.path.join(os.environ.get("CARGO_HOME", os.path.expanduser("~/.cargo")), "bin")])) or "cargo-web"
    listed = subprocess.run(
        [cargo, "metadata", "--locked", "--format-version", "1", "--filter-platform", "x86_64-unknown-linux-gnu",
         "--manifest-path", str(ROOT / "bridge" / "Cargo.toml")], capture_output=True, text=True, check=True)
    return sorted((p["name"], p["version"], re.sub(" ?/ ?", " OR ", p["license"]), pathlib.Path(p["manifest_path"]).parent)
                  for p in json.loads(listed.stdout)["packages"] if p["source"])


def page():
    lines = ["# What others wrote", "",
             "Moesaic is under Apache-2.0 (`LICENSE`). The folder that `make dist` makes holds these beside it; their texts are in its "
             "`licenses/`. Made by `tools/third_party.py`.", "", "| library | licence | what of it |", "|---|---|---|"]
    lines += [f"| {name} | {licence} | {what} |" for name, licence, what, _ in LIBRARIES]
    lines += ["", "Rust crates, compiled in:", "", "| crate | licence |", "|---|---|"]
    lines += [f"| {name} {version} | {licence} |" for name, version, licence, _ in crates()]
    return "\n".join(lines) + "\n"


def write_texts(folder):
    packages = next((ROOT / ".venv" / "lib").glob("python3*/site-packages"))
    found = {name: [text for place in (pathlib.Path("/"), ROOT, packages) for text in place.glob(where.lstrip("/"))]
             for name, _, _, where in LIBRARIES}
    found |= {f"{name} {version}": [path for path in sorted(source.iterdir()) if path.is_file() and re.match(
        "LICEN|COPYING|UNLICENSE|NOTICE", path.name.upper())] for name, version, _, source in crates()}
    missing = [name for name, texts in found.items() if not texts]
    if missing:
        sys.exit(f"third_party: no text of the licence was found for {', '.join(missing)}")
    for name, texts in found.items():
        into = folder / re.sub(r"[^\w.+-]+", "-", name)
        into.mkdir(parents=True)
        for text in texts:
            package = text.parent.parent.name.removesuffix(".dist-info") + "-" if len({t.name for t in texts}) < len(texts) else ""
            shutil.copyfile(text, into / f"{package}{text.name}")


def main(arguments):
    if arguments[:1] == ["--texts"]:
        write_texts(pathlib.Path(arguments[1]))
    elif arguments == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != page():
            sys.exit("THIRD_PARTY.md is not what bridge/Cargo.lock and tools/third_party.py say: run tools/third_party.py")
    else:
        PAGE.write_text(page(), encoding="utf-8")


main(sys.argv[1:])
