"""The demo's base, SmolLM2-135M-Instruct from its GGUF, against transformers loading the same file."""

import copy
import json
import subprocess

import pytest
import torch
import transformers

import common

GGUF = common.ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MESSAGES = [{"role": "user", "content": "Sort these words: pear, apple, fig. Then say why 12 > 7, in one line."}]
ANSWER = "apple, fig, pear. Twelve is five more than seven.\n\nÜbrigens: naïve café, 3.14 and 你好."

pytestmark = pytest.mark.skipif(not GGUF.exists(), reason=f"{GGUF.name} is not here: `tools/setup demo` fetches it")


@pytest.fixture(scope="module")
def reference():
    """(model, tokenizer) of transformers, in float32."""
    arguments = dict(pretrained_model_name_or_path=GGUF.parent, gguf_file=GGUF.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**arguments)


@pytest.fixture(scope="module")
def prompt(reference):
    text = reference[1].apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    return reference[1](text, add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def sequences(reference, prompt):
    return [prompt + reference[1](ANSWER, add_special_tokens=False).input_ids, prompt]


def test_logits(reference, sequences, driver, tmp_path):
    with torch.no_grad():
        theirs = common.reference_logits(reference[0], sequences)
    masks = [[1] * len(s) for s in sequences]
    ours = driver.run(tmp_path / "out.safetensors", model=GGUF, sequences=sequences, mask=masks)
    common.assert_close(ours["logits"], theirs, "logits")
    common.assert_close(ours["loss"], common.loss_of(theirs, sequences, masks), "loss")
    cached = driver.run(tmp_path / "out.safetensors", model=GGUF, mode="cached", sequences=sequences)
    common.assert_close(cached["logits"], theirs, "logits through the cache")


def test_int8(reference, sequences, driver, tmp_path):
    """Weight-only int8 is as near to float32 as transformers with weights rounded the same way.

    Not closer than that: weights that come from a 4-bit grid often lie exactly between two int8 steps, and such a tie
    may go either way. Random weights have no ties; test_base.py compares those number by number.
    """
    with torch.no_grad():
        exact = common.reference_logits(reference[0], sequences)
        theirs = common.reference_logits(common.round_linears_to_int8(copy.deepcopy(reference[0])), sequences)
    ours = driver.run(tmp_path / "out.safetensors", model=GGUF, mode="cached", quantize=True, sequences=sequences)
    error, their_error = (ours["logits"] - exact).abs().max().item(), (theirs - exact).abs().max().item()
    assert error < 1.25 * their_error, f"ours {error:.3f}, transformers with int8 weights {their_error:.3f}"
    agree = (ours["logits"].argmax(-1) == exact.argmax(-1)).float().mean().item()
    assert agree > 0.9, f"int8 and float32 name the same best token in {agree:.0%} of the rows"


def test_greedy(reference, prompt, driver):
    theirs = reference[0].generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, num_beams=1,
                                   repetition_penalty=1.0)[0, len(prompt):].tolist()
    ours = driver.call(model=GGUF, mode="generate", sequences=[prompt], generation={"max_new_tokens": 40})["generations"][0]["ids"]
    assert ours == theirs


def test_score_command(reference, sequences):
    """`moesaic score --ids` prints log p(ids[i+1] | ids[0..i])."""
    program = common.BUILD / "moesaic"
    output = subprocess.run([program, "score", "--model", GGUF, "--ids", ",".join(map(str, sequences[0])), "--json"],
                            check=True, capture_output=True, text=True).stdout
    ours = json.loads(output)
    assert ours["ids"] == sequences[0]
    with torch.no_grad():
        logits = common.reference_logits(reference[0], sequences[:1])
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(sequences[0][1:])[:, None])[:, 0]
    common.assert_close(torch.tensor(ours["logprobs"]), expected, "logprobs")
    assert ours["sum"] == pytest.approx(expected.sum().item(), rel=1e-4)
    assert ours["perplexity"] == pytest.approx(torch.exp(-expected.mean()).item(), rel=1e-3)


def test_score_text(reference):
    """`moesaic score --text` tokenises as transformers does."""
    program = common.BUILD / "moesaic"
    output = subprocess.run([program, "score", "--model", GGUF, "--text", ANSWER, "--json"], check=True,
                            capture_output=True, text=True).stdout
    assert json.loads(output)["ids"] == reference[1](ANSWER).input_ids
