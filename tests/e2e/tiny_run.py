"""A tiny random Llama with a tokenizer, a data file and a run file: what the training tests of the program share."""

import json
import os
import pathlib
import re
import subprocess

import pytest
import tokenizers
import torch
import transformers
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = pathlib.Path(os.environ.get("MOESAIC_BUILD_DIR", ROOT / "build")) / "moesaic"
# The number format of whatever asks the hardware otherwise: a run of the tests with bfloat16 is a CTest entry of its own.
DTYPE = os.environ.get("MOESAIC_TEST_DTYPE", "float32")
float32_only = pytest.mark.skipif(DTYPE != "float32", reason="compares with float32 references, or trains all weights")
# {method: what it is}, every method that an adapter may have, from the page that tests/docs_test.py holds to the program.
METHODS = dict(re.findall(r"`(\w+)` \(([^)]*)\)", re.search(
    r"^\| `finetuning_type` .*", (ROOT / "docs" / "config.md").read_text(encoding="utf-8"), re.MULTILINE)[0]))
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "is", "not"]


def make_model(folder, initializer_range=0.02, kind=transformers.LlamaConfig, **changes):
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>"] + WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = kind(**{
        "vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
        "eos_token_id": 1, "initializer_range": initializer_range, **changes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def make_run(folder, initializer_range=0.02, **changes):
    """Writes model, data and run.yaml into `folder` (once) and returns the run file's path."""
    if not (folder / "model").exists():
        make_model(folder / "model", initializer_range)
        rows = [{"inputs": f"{a} {b} ", "targets": f"{b} {a} {a}"} for a in WORDS for b in WORDS]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "model_name_or_path": str(folder / "model"), "dataset": [str(folder / "rows.jsonl")], "template": "none",
        "finetuning_type": "molora", "num_experts": 3, "lora_rank": 2, "lora_dropout": 0.2,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "max_steps": 60, "save_steps": 5, "logging_steps": 4,
        "output_dir": str(folder / "out"),
        "bf16": DTYPE == "bfloat16" and changes.get("finetuning_type") != "full", **changes,
    }
    path = folder / (pathlib.Path(run["output_dir"]).name + ".yaml")
    path.write_text(yaml.safe_dump(run))
    return path


def with_dtype(arguments):
    """`arguments` with the tests' number format for verbs that ask the hardware, where they name none."""
    asks = arguments and arguments[0] in {"generate", "chat", "compose", "convert", "demo"}
    return [*arguments, "--dtype", DTYPE] if asks and "--dtype" not in arguments else list(arguments)


def command(*arguments):
    return [str(PROGRAM), *map(str, with_dtype(arguments)), "--device", "cpu", "--threads", "1"]


def moesaic(*arguments, **options):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, **options)


def run(*arguments):
    """What a command that must succeed prints."""
    done = moesaic(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(folder, name, **changes):
    """Trains a tiny run whose weights make a visible difference; its adapter's folder."""
    run("train", make_run(folder, initializer_range=0.3, output_dir=str(folder / name),
                          **{"max_steps": 8, "save_steps": 0, "learning_rate": 3e-2, "lora_dropout": 0.0, **changes}))
    return folder / name
