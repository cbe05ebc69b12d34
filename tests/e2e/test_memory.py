"""What `--dry-run` says of a run's memory is what the run takes at its peak, in both number formats; bfloat16 takes less
than float32, and int8 less than either."""

import json
import os
import re
import subprocess

import pytest

import tiny_run

# Of 49 million parameters and 1,024 tokens a step: weights and activations outweigh the program itself.
SIZES = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4,
             vocab_size=8192, max_position_embeddings=512)
METHODS = {"lora": dict(finetuning_type="lora", num_experts=None, lora_rank=8, lora_target="all"),
           "molora": dict(finetuning_type="molora", num_experts=8, lora_rank=4, lora_target="all"),
           "mov": dict(finetuning_type="mov", num_experts=8)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory")
    tiny_run.make_model(path / "model", **SIZES)
    row = {"inputs": "red cat " * 32, "targets": "one " * 63}
    (path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 16)
    return path


def peak(*arguments):
    """MiB that the program holds at most, and what it prints."""
    done = subprocess.run(["/usr/bin/env", "python3", "-c", "import resource, subprocess, sys\n"
                           "code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode\n"
                           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)\n"
                           "sys.exit(code)", *tiny_run.command(*arguments)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return int(done.stdout), done.stderr


def run_file(folder, method, dtype):
    name = f"{method}_{dtype}"
    return tiny_run.make_run(folder, output_dir=str(folder / name), **METHODS[method], bf16=dtype == "bfloat16",
                             per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=2, save_steps=0,
                             lora_dropout=0.0)


@pytest.fixture(scope="module")
def measured(folder):
    """MiB by method and number format: estimate and peak."""
    figures = {}
    for method in METHODS:
        for dtype in ["float32", "bfloat16"]:
            run = run_file(folder, method, dtype)
            said = tiny_run.run("train", run, "--dry-run")
            estimate = int(re.search(r"^memory +(\d+) MiB", said, re.MULTILINE).group(1))
            figures[method, dtype] = estimate, peak("train", run)[0]
    return figures


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_the_peak(measured, method, dtype):
    estimate, taken = measured[method, dtype]
    assert estimate == pytest.approx(taken, rel=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_takes_less(measured, method):
    assert measured[method, "bfloat16"][1] < 0.8 * measured[method, "float32"][1]


def test_int8_takes_less(folder):
    def generating(*flags):
        return peak("generate", "--model", folder / "model", "--raw", "-p", "red cat", "--max_new_tokens", 2, *flags)[0]
    floats = generating("--dtype", "float32")
    # 49 million weights: 12 layers of 3.4 million are 39 MiB in int8, 156 MiB in float32.
    assert generating("--dtype", "float32", "--quantize", "int8") < floats - 90
    assert generating("--dtype", "bfloat16", "--quantize", "int8") < generating("--dtype", "bfloat16") - 20
