"""Generation by greedy and beam search, token for token what transformers gives; what draws are made from; and
incremental decoding, logit for logit what a full forward gives."""

import itertools

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
    answers = driver.call(model=folder, mode="generate", sequences=prompts,
                          generation={"max_new_tokens": NEW_TOKENS})["generations"]
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
    answers = driver.call(model=folder, mode="generate", sequences=prompts,
                          generation={"max_new_tokens": NEW_TOKENS})["generations"]
    for prompt, answer in zip(prompts, answers, strict=True):
        model = common.make_model("llama-rope-dynamic")  # its frequencies remember earlier calls
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt):]
        assert answer["ids"] == theirs.tolist()


# What ends an answer in the searches: so many that some do at every length.
ENDS = list(range(3, common.TINY["vocab_size"], 6))


def search_model(name, folder):
    """A tiny model with its tokenizer whose next token is in doubt: the logits of a tied head are large."""
    model = common.make_model(name)
    if name == "gemma":
        model.model.norm.weight.copy_((1 + model.model.norm.weight) / 8 - 1)
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return model


def searched(model, prompt, **options):
    """transformers' answers to a prompt, best first, with their scores, and the smallest gap between the log-probability
    of a beam that went on and of the best that did not: below it, rounding may let another go on."""
    gap = float("inf")
    choose = type(model)._get_running_beams_for_next_iteration

    def watched(topk_log_probs, next_token_hits_stopping_criteria, num_beams, **more):
        nonlocal gap
        open_ones = topk_log_probs[~next_token_hits_stopping_criteria]
        if len(open_ones) > num_beams:
            gap = min(gap, (open_ones[num_beams - 1] - open_ones[num_beams]).item())
        return choose(model, topk_log_probs=topk_log_probs, num_beams=num_beams,
                      next_token_hits_stopping_criteria=next_token_hits_stopping_criteria, **more)

    model._get_running_beams_for_next_iteration = watched
    try:
        out = model.generate(torch.tensor([prompt]), do_sample=False, return_dict_in_generate=True, output_scores=True,
                             eos_token_id=ENDS, pad_token_id=0, **options)
    finally:
        del model._get_running_beams_for_next_iteration
    begin = 1 if model.config.is_encoder_decoder else len(prompt)
    answers = []
    for row in out.sequences[:, begin:].tolist():
        end = next((i for i, token in enumerate(row) if token in ENDS), len(row) - 1)
        answers.append(row[:end + 1])
    return answers, out.sequences_scores.tolist(), gap


def assert_same_search(model, prompt, answers, **options):
    ids, scores, gap = searched(model, prompt, **options)
    assert gap > 1e-4, "the reference itself is undecided: choose another seed"
    assert [answer["ids"] for answer in answers] == ids, options
    assert [answer["score"] for answer in answers] == pytest.approx(scores, rel=1e-5, abs=1e-5)
    for answer in answers:
        assert (answer["finish_reason"] == "stop") == (answer["ids"][-1] in ENDS)


@pytest.mark.parametrize("name, num_beams", [("llama", 2), ("llama", 4), ("llama", 5), ("gemma", 4), ("t5", 4),
                                             ("t5-gated", 2), ("t5-gated", 4), ("t5-gated", 5)])
def test_beam_search(name, num_beams, driver, tmp_path):
    """All beams and their scores for every penalty and way to stop. All prompts are one batch here and apart there,
    every other one in turn, for time's sake."""
    model = search_model(name, tmp_path)
    prompts = common.sequences(lengths=PROMPTS, seed=12)
    options = dict(max_new_tokens=11, num_beams=num_beams, num_return_sequences=num_beams)
    lengths = set()
    for turn, (penalty, early) in enumerate(itertools.product([0.0, 1.0, 2.0, -1.0], [False, True, "never"])):
        answers = driver.call(model=tmp_path, mode="generate", sequences=prompts, generation=dict(
            **options, eos_ids=ENDS, length_penalty=penalty, early_stopping=str(early).lower()))["generations"]
        assert len(answers) == num_beams * len(prompts)
        lengths |= {len(answer["ids"]) for answer in answers}
        for i in range(turn % 2, len(prompts), 2):
            assert_same_search(model, prompts[i], answers[i * num_beams:(i + 1) * num_beams], length_penalty=penalty,
                               early_stopping=early, **options)
    assert len(lengths) > 4 and options["max_new_tokens"] in lengths, "the answers must end in many ways"


@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_beam_search_with_a_penalty_on_repetitions(name, driver, tmp_path):
    model = search_model(name, tmp_path)
    options = dict(max_new_tokens=11, num_beams=3, num_return_sequences=2, repetition_penalty=1.3)
    prompts = common.sequences(lengths=PROMPTS, seed=12)
    answers = driver.call(model=tmp_path, mode="generate", sequences=prompts,
                          generation=dict(**options, eos_ids=ENDS))["generations"]
    for i, prompt in enumerate(prompts):
        assert_same_search(model, prompt, answers[2 * i:2 * i + 2], **options)


def test_beam_search_equals_that_of_a_padded_batch(driver, tmp_path):
    """transformers' own batch: an encoder's prompts padded at the right."""
    model = search_model("t5-gated", tmp_path)
    prompts = common.sequences(lengths=PROMPTS, seed=12)
    options = dict(max_new_tokens=11, num_beams=4)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
    theirs = model.generate(padded, attention_mask=padded != 0, do_sample=False, eos_token_id=ENDS, pad_token_id=0,
                            **options)[:, 1:]
    answers = driver.call(model=tmp_path, mode="generate", sequences=prompts,
                          generation=dict(**options, eos_ids=ENDS))["generations"]
    for row, answer in zip(theirs.tolist(), answers, strict=True):
        assert row[:len(answer["ids"])] == answer["ids"]


DRAWS = [dict(temperature=0.7), dict(temperature=1.4, top_k=9), dict(temperature=1.1, top_p=0.8),
         dict(temperature=0.9, min_p=0.1), dict(temperature=1.3, top_k=30, top_p=0.9, min_p=0.02)]


def drawn_from(model, prompt, options):
    """The logits of the next token that transformers draws from: -inf where a token is left out."""
    out = model.generate(torch.tensor([prompt]), do_sample=True, max_new_tokens=1, return_dict_in_generate=True,
                         output_scores=True, output_logits=True, **{"top_k": 0, "top_p": 1.0, **options})
    return out.logits[0][0], out.scores[0][0]


@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_draws_are_made_from_what_transformers_draws_from(name, driver, models):
    model, _ = models(name)
    for options in DRAWS:
        rows, expected = zip(*(drawn_from(model, p, options) for p in common.sequences(lengths=PROMPTS, seed=8)))
        ours = driver.call(mode="filter", logits=torch.stack(rows).tolist(), generation=options)["logits"]
        for row, theirs in zip(ours, expected, strict=True):
            assert [z is None for z in row] == theirs.isneginf().tolist(), options
            assert [z for z in row if z is not None] == pytest.approx(theirs[theirs.isfinite()].tolist(), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_draws_have_the_probabilities_of_transformers(name, driver, models):
    """Many answers of one token to two prompts: every frequency within five standard deviations of its probability."""
    model, folder = models(name)
    add_tokenizer(folder)
    prompts, count, options = common.sequences(lengths=[5, 9], seed=8), 3000, dict(temperature=2.0, top_k=20)
    answers = driver.call(model=folder, mode="generate", sequences=prompts, generation=dict(
        **options, max_new_tokens=1, num_return_sequences=count, seed=5))["generations"]
    for i, prompt in enumerate(prompts):
        p = drawn_from(model, prompt, options)[1].softmax(0)
        drawn = torch.tensor([answer["ids"][0] for answer in answers[i * count:(i + 1) * count]])
        frequency = torch.bincount(drawn, minlength=len(p)) / count
        assert ((frequency - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()


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
