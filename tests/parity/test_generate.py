"""Greedy generation and incremental decoding: token for token and logit for logit what a full forward gives."""

import peft
import pytest
import tokenizers
import torch

import common
from mixtures import Mixture

PROMPTS = [5, 17, 1, 9]
NEW_TOKENS = 24


def add_tokenizer(folder):
    """A word-level tokenizer over w0, w1, ...: generation asks for one."""
    words = {f"w{i}": i for i in range(common.TINY["vocab_size"])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "w2", "bos_token": "w1"}')


def greedy(model, prompt):
    """Greedy continuation with a full forward per token; stops behind the EOS.

    Also the smallest gap between the best two logits: below it, rounding may pick another token.
    """
    answer, gap = [], float("inf")
    while len(answer) < NEW_TOKENS and (not answer or answer[-1] != common.TINY["eos_token_id"]):
        if model.config.is_encoder_decoder:
            text = {"input_ids": torch.tensor([prompt]),
                    "decoder_input_ids": torch.tensor([[common.start_id(model), *answer]])}
        else:
            text = {"input_ids": torch.tensor([[*prompt, *answer]])}
        with torch.no_grad():
            best = model(**text, use_cache=False).logits[0, -1].topk(2)
        gap = min(gap, (best.values[0] - best.values[1]).item())
        answer.append(best.indices[0].item())
    return answer, gap


# The dynamic rope is left out: what transformers computes with a cache depends on the order of the calls.
@pytest.mark.parametrize("name", [n for n in common.FAMILIES if "dynamic" not in n])
def test_greedy(name, driver, models, tmp_path):
    model, folder = models(name)
    add_tokenizer(folder)
    prompts = common.sequences(lengths=PROMPTS, seed=9 if name in common.SEQ2SEQ else 8)
    answers = driver.call(model=folder, mode="generate", sequences=prompts, max_new_tokens=NEW_TOKENS)["generations"]
    for prompt, answer in zip(prompts, answers, strict=True):
        expected, gap = greedy(model, prompt)
        assert gap > 1e-4, "the reference itself is undecided: choose another seed"
        assert answer["ids"] == expected
        assert answer["finish_reason"] == ("stop" if expected[-1] == common.TINY["eos_token_id"] else "length")


def test_transformers_generate_agrees(driver, models):
    """The loop above is what `generate` does."""
    model, _ = models("llama")
    prompt = common.sequences(lengths=[9], seed=8)[0]
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt):]
    assert theirs.tolist() == greedy(model, prompt)[0]
    model, _ = models("t5-start")
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, 1:]
    assert theirs.tolist() == greedy(model, prompt)[0]


def test_dynamic_rope_generates_as_transformers_with_its_cache(driver, models):
    """Across the original length, 12: each step turns by the length so far, and what is cached stays as it is."""
    _, folder = models("llama-rope-dynamic")
    add_tokenizer(folder)
    prompts = common.sequences(lengths=[5, 17, 12, 9], seed=9)
    answers = driver.call(model=folder, mode="generate", sequences=prompts, max_new_tokens=NEW_TOKENS)["generations"]
    for prompt, answer in zip(prompts, answers, strict=True):
        model = common.make_model("llama-rope-dynamic")  # its frequencies remember earlier calls
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt):]
        assert answer["ids"] == theirs.tolist()


@pytest.mark.parametrize("name", [n for n in common.FAMILIES if "dynamic" not in n])
def test_cached_logits(name, driver, models, tmp_path):
    model, folder = models(name)
    ids = common.sequences()
    ours = driver.run(tmp_path / "out.safetensors", model=folder, mode="cached", sequences=ids,
                      prompts=common.prompt_lengths(ids))
    common.assert_close(ours["logits"], common.reference_logits(model, ids), "logits")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "t5-gated"])
@pytest.mark.parametrize("method", ["lora", "ia3", "mov", "molora", "mov-layer-input", "molora-sentence"])
def test_cached_logits_with_adapter(name, method, driver, models, tmp_path):
    _, folder = models(name)
    ids = common.sequences()
    sentence = None
    if method in ("lora", "ia3"):
        scaled, down = (["k", "v", "wo"], "wo") if name == "t5-gated" else (["k_proj", "v_proj", "down_proj"], "down_proj")
        config = (peft.LoraConfig(target_modules="all-linear", init_lora_weights=False) if method == "lora" else
                  peft.IA3Config(target_modules=scaled, feedforward_modules=[down], init_ia3_weights=False))
        wrapped = peft.get_peft_model(common.make_model(name), config).eval()
        wrapped.save_pretrained(tmp_path / "adapter")
        with torch.no_grad():
            logits = common.reference_logits(wrapped, ids)
    else:
        kind, _, router = method.partition("-")
        mixture = Mixture(common.make_model(name), kind, input=router.replace("-", "_") or "token",
                          sentence_dim=7 if router == "sentence" else 0)
        if router == "sentence":
            sentence = torch.randn(len(ids), 7, generator=torch.Generator().manual_seed(4))
        mixture.save(tmp_path / "adapter")
        with torch.no_grad():
            logits = mixture.logits(ids, sentence)
    ours = driver.run(tmp_path / "out.safetensors", model=folder, adapter=tmp_path / "adapter", mode="cached",
                      sequences=ids, prompts=common.prompt_lengths(ids),
                      sentence=None if sentence is None else sentence.tolist())
    common.assert_close(ours["logits"], logits, "logits")
