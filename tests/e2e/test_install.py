"""The installed library, as a program of somebody else uses it: from a clean folder, into a prefix with a space."""

import os
import subprocess

import tiny_run

BUILD = tiny_run.PROGRAM.parent


def checked(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_find_package_compile_train_generate(tmp_path):
    prefix = tmp_path / "a prefix"
    checked("cmake", "--install", BUILD, "--prefix", prefix)
    assert "moesaic" in checked(prefix / "bin" / "moesaic", "--version")
    # Nothing of the tree but the example: its folder, copied.
    source = tmp_path / "example"
    source.mkdir()
    for file in (tiny_run.ROOT / "examples").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    assert len((source / "train_mov.cpp").read_text().splitlines()) < 60
    environment = {key: value for key, value in os.environ.items() if key not in {"CXX", "CC"}}
    build = tmp_path / "build"
    checked("cmake", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Debug", env=environment)
    checked("cmake", "--build", build, env=environment)
    tiny_run.make_run(tmp_path, initializer_range=0.3)
    printed = checked(build / "train_mov", tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out", "red green")
    assert "method     mov, 4 experts" in printed and "answer: " in printed
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    missing = subprocess.run([str(build / "train_mov"), "nothing", "rows", "out", "x"], capture_output=True, text=True)
    assert missing.returncode in (2, 3) and missing.stderr.startswith("error: ")
