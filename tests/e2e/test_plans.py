"""`train --dry-run --for`: what a run takes on a GPU that is not here, its operations against PyTorch's own count."""

import re

import peft
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import test_seq2seq
import tiny_run
from tiny_run import WORDS

WIDE = {"d_model": 256, "d_ff": 512, "d_kv": 64}
LINES = {"prompt": 6, "answer": 17}  # tokens of every row: words and their </s>; words and theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 folder without weights, and rows that are all of one length."""
    path = tmp_path_factory.mktemp("plans")
    test_seq2seq.make_model(path / "model", **WIDE)
    (path / "model" / "model.safetensors").unlink()
    return path


def plan(folder, name, *flags, **changes):
    run = test_seq2seq.make_run(folder, name, **changes)
    rows = [f'{{"inputs": "{a} {b} is not {a}", "targets": "{8 * (b + " " + a + " ")}"}}\n' for a in WORDS for b in WORDS]
    (folder / "rows.jsonl").write_text("".join(rows))
    return tiny_run.run("train", run, "--dry-run", *flags)


def counted(folder, **options):
    """Operations of a micro-batch of 4 rows, forward and backward, on the meta device."""
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder / "model")
        model = transformers.T5ForConditionalGeneration(config)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **options)).to("meta")
    source = torch.zeros(4, LINES["prompt"], dtype=torch.long, device="meta")
    labels = torch.zeros(4, LINES["answer"], dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=source, labels=labels).loss.backward()
    return counter.get_total_flops()


def test_operations_are_pytorchs(folder):
    text = plan(folder, "lora", "--for", "h100", finetuning_type="lora", num_experts=1, lora_rank=4,
                lora_target="all-linear", max_steps=50, bf16=None)
    steps, tokens, examples, tera = re.search(
        r"(\d+) steps of (\d+) tokens in (\d+) examples, ([\d.e+-]+) TFLOP each", text).groups()
    assert (steps, tokens, examples) == ("50", str(4 * (LINES["prompt"] + LINES["answer"])), "4")
    expected = counted(folder, r=4, target_modules=r".*\.(q|k|v|o|wi_0|wi_1|wo)")
    # Ours counts the start token, and the gradient of what the first layers read, which nobody asks for.
    assert 0.98 < float(tera) * 1e12 / expected < 1.15, (float(tera) * 1e12, expected)
    assert "planned from its config.json" in text and "on one h100" in text and "of its 80 GB" in text
    assert "989 TFLOP/s in bfloat16" in text


def test_a_plan_is_asked_for_dryly(folder):
    run = test_seq2seq.make_run(folder, "wet")
    done = tiny_run.moesaic("train", run, "--for", "h100")
    assert done.returncode == 2 and "--dry-run" in done.stderr
    done = tiny_run.moesaic("train", run, "--dry-run", "--for", "h1000")
    assert done.returncode == 2 and "h100" in done.stderr
    done = tiny_run.moesaic("train", run)
    assert done.returncode in (2, 3) and "safetensors" in done.stderr  # what is trained needs weights
    text = plan(folder, "epochs", "--for", "l4", num_train_epochs=2, max_steps=-1)
    assert f"{2 * len(WORDS) ** 2 // 4} steps" in text
