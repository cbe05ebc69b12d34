"""The folder that `make dist` makes: unpacked elsewhere, it runs with an empty environment and its own libraries."""

import re
import sys

import pytest

import tiny_run
from test_install import checked

SYSTEM = re.compile(r"linux-vdso|ld-linux|lib(c|m|dl|rt|util|pthread|stdc\+\+|gcc_s)\.so")  # those of C and C++


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("dist")
    checked(sys.executable, tiny_run.ROOT / "tools" / "third_party.py", "--texts", made / "licenses")
    checked("cmake", f"-DPROGRAM={tiny_run.PROGRAM}", f"-DLICENSES={made / 'licenses'}", "-DVERSION=1.2.3",
            "-P", tiny_run.ROOT / "cmake" / "Dist.cmake", cwd=made)
    checked("sha256sum", "--check", "SHA256SUMS", cwd=made)
    archive = next(made.glob("moesaic-1.2.3-linux-*.tar.zst"))
    assert archive.stat().st_size < 130e6
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    checked("cmake", "-E", "tar", "xf", archive, cwd=elsewhere)
    return next(elsewhere.iterdir()).rename(elsewhere / "my moesaic")


def test_it_trains_and_answers_with_nothing_around_it(folder, tmp_path):
    def run(*arguments):
        return checked(folder / "bin" / "moesaic", *arguments, env={}, cwd=tmp_path)
    assert re.match(r"moesaic \d+\.\d+\.\d+ \(", run("--version"))
    tiny_run.make_run(tmp_path, max_steps=3)
    run("train", "out.yaml", "--threads", 1)
    assert "text" in run("generate", "out", "-p", "red", "--json", "--max_new_tokens", 2)


def test_its_libraries_are_its_own(folder):
    loaded = checked(folder / "bin" / "moesaic", env={"LD_TRACE_LOADED_OBJECTS": "1"})
    assert len(loaded.splitlines()) > 15 and "not found" not in loaded
    outside = [line for line in loaded.splitlines() if str(folder) not in line]
    assert all(SYSTEM.search(line) for line in outside), outside


def test_it_names_no_folder_of_the_machine_that_made_it(folder):
    program = (folder / "bin" / "moesaic").read_bytes()
    assert str(tiny_run.ROOT).encode() not in program and b".cargo/registry" not in program


def test_everybodys_licence_is_there(folder):
    checked(sys.executable, tiny_run.ROOT / "tools" / "third_party.py", "--check")
    page = (folder / "THIRD_PARTY.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    texts = list((folder / "licenses").iterdir())
    assert len(texts) == len(rows) - 2 and all(any(text.iterdir()) for text in texts)  # two heads
