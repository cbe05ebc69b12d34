"""A tiny T5 through every verb, against transformers: an encoder reads prompts, a decoder answers."""

import io
import json
import shutil

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
import yaml
from safetensors.torch import load_file

import tiny_run
from tiny_run import WORDS, float32_only, run

START = 0
CHOICES = ["red", "two three", "dog cat one", "green"]


def make_model(folder, tied=False, **changes):
    """Weights large enough that the best token is clearly the best; T5's own tokenizer over whole words."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words += [("▁" + word, -3.0) for word in WORDS] + [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    words += [("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)]
    transformers.T5Tokenizer(vocab=words, extra_ids=2).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(**{
        "vocab_size": len(words) + 6, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4,
        "feed_forward_proj": "relu" if tied else "gated-gelu", "tie_word_embeddings": tied, "decoder_start_token_id": START,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, **changes})
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if name in ("shared.weight", "lm_head.weight") else
                                  0.7 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return model


def make_run(folder, name, **changes):
    rows = [{"inputs": f"{a} {b} is", "targets": f"{b} {a}"} for a in WORDS for b in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model_name_or_path": str(folder / "model"), "dataset": [str(folder / "rows.jsonl")],
                "finetuning_type": "mov", "num_experts": 3, "per_device_train_batch_size": 4, "learning_rate": 3e-2,
                "max_steps": 8, "save_steps": 0, "output_dir": str(folder / name),
                "bf16": tiny_run.DTYPE == "bfloat16" and changes.get("finetuning_type") != "full", **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("seq2seq")
    make_model(path / "model")
    return path


@pytest.fixture(scope="module")
def reference(folder):
    return (transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "model").eval(),
            transformers.AutoTokenizer.from_pretrained(folder / "model"))


def logprobs(reference, source, labels):
    """log p of each label behind the source."""
    model, tokenizer = reference
    with torch.no_grad():
        logits = model(**tokenizer(source, return_tensors="pt"), labels=torch.tensor([labels])).logits[0]
    return [row[i].item() for row, i in zip(logits.log_softmax(-1), labels, strict=True)]


PROMPTS = ["red one cat is", "dog", "three two one not blue green", "is  not\tcat", "red unheardof"]


def answers(stdout):
    return [json.loads(line) for line in stdout.splitlines()]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_generate(folder, reference, tmp_path, penalty):
    """Side by side what transformers gives one by one, token for token; a penalty counts the answer's tokens alone."""
    model, tokenizer = reference
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    ours = answers(run("generate", "--model", folder / "model", "--prompts", tmp_path / "prompts.txt", "--json",
                       "--max_new_tokens", 12, "--repetition_penalty", penalty, "--dtype", "float32"))
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        batch = tokenizer(prompt, return_tensors="pt")
        theirs = model.generate(**batch, max_new_tokens=12, do_sample=False, repetition_penalty=penalty)[0, 1:].tolist()
        assert answer["ids"] == theirs
        assert answer["prompt_tokens"] == batch["input_ids"].shape[1]
        assert answer["text"] == tokenizer.decode(theirs, skip_special_tokens=True)


def test_sampling_does_not_depend_on_the_batch(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    flags = ["generate", "--model", folder / "model", "--prompts", tmp_path / "prompts.txt", "--json", "--temperature",
             1.0, "--max_new_tokens", 6, "--seed", 5, "--dtype", "float32", "--batch_size"]
    together, alone = answers(run(*flags, 5)), answers(run(*flags, 1))
    assert [a["ids"] for a in together] == [a["ids"] for a in alone]
    assert len({tuple(a["ids"]) for a in together}) > 1


def test_score(folder, reference):
    _, tokenizer = reference
    source, target = "red one cat is", "two dog"
    labels = tokenizer(text_target=target)["input_ids"]
    assert labels[-1] == tokenizer.eos_token_id
    done = json.loads(run("score", "--model", folder / "model", "--text", source, "--target", target, "--score_eos",
                          "--json"))
    assert done["ids"] == labels and done["prompt_ids"] == tokenizer(source)["input_ids"]
    assert done["logprobs"] == pytest.approx(logprobs(reference, source, labels), abs=1e-4)
    refused = tiny_run.moesaic("score", "--model", folder / "model", "--text", source)
    assert refused.returncode == 2 and "a token of a prompt was to be predicted" in refused.stderr


def test_eval_ranks_choices(folder, reference, tmp_path):
    """The encoder reads a question once; every choice of unequal length, its EOS too, as T0 scores."""
    _, tokenizer = reference
    rows = [{"inputs": f"{a} is not", "answer_choices": CHOICES, "target": CHOICES[i % 4]}
            for i, a in enumerate(WORDS)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for batch_size in (1, "auto"):
        run("eval", "--model", folder / "model", "--tasks", tmp_path / "task.jsonl", "--score_eos", "--log_samples",
            "--batch_size", batch_size, "--output_path", tmp_path / str(batch_size))
        [samples] = (tmp_path / str(batch_size)).rglob("samples_*.jsonl")
        for row, line in zip(rows, samples.read_text().splitlines(), strict=True):
            scores = [pair[0][0] for pair in json.loads(line)["resps"]]
            theirs = [sum(logprobs(reference, row["inputs"], tokenizer(text_target=c)["input_ids"]))
                      for c in CHOICES]
            assert scores == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("method", tiny_run.METHODS)
def test_train_resume_generate_and_show_routes(folder, method, tmp_path):
    """Every method learns to swap two words; a run that is cut and resumed is the run in one piece."""
    experts = 3 if "mixture" in tiny_run.METHODS[method] else 1
    settings = dict(finetuning_type=method, num_experts=experts, lora_rank=4, max_steps=40, save_steps=20,
                    gradient_checkpointing=method == "mov", learning_rate=2e-2, logging_steps=1)
    whole, cut = f"{method}-whole", f"{method}-cut"
    run("train", make_run(folder, whole, **settings))
    run("train", make_run(folder, cut, **settings))
    for made in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        (folder / cut / made).unlink(missing_ok=True)
    shutil.rmtree(folder / cut / "checkpoint-40")
    run("train", folder / f"{cut}.yaml", "--resume", "auto")
    files = [(folder / name / "adapter_model.safetensors").read_bytes() for name in (whole, cut)]
    assert files[0] == files[1]
    config = json.loads((folder / whole / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    losses = [row["loss"] for row in answers((folder / whole / "train_log.jsonl").read_text()) if "loss" in row]
    assert sum(losses[-10:]) < sum(losses[:10])
    [answer] = answers(run("generate", "--model", folder / "model", "--adapter", folder / whole, "-p", "red one is",
                           "--json", "--max_new_tokens", 4))
    assert answer["ids"]
    if experts == 1:
        return
    (tmp_path / "task.jsonl").write_text(json.dumps({"inputs": "red one is", "answer_choices": ["one red", "dog"], "target": "one red"}))
    run("routes", "--model", folder / "model", "--adapter", folder / whole, "--tasks", tmp_path / "task.jsonl", "--text",
        "red one is", "-o", tmp_path / "routes")
    routes = json.loads((tmp_path / "routes.json").read_text())
    sites = routes["routers"][whole]
    assert {site.split(".")[0] for site in sites} == {"encoder", "decoder"}
    assert any("EncDecAttention.k" in site for site in sites)


@float32_only
def test_learns(folder):
    """Full fine-tuning and LoRA of everything swap two words on the training rows; transformers reads the result."""
    common = dict(max_steps=150, per_device_train_batch_size=20, learning_rate=5e-3, save_steps=0)
    run("train", make_run(folder, "full", finetuning_type="full", num_experts=1, **common))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "full").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "full")
    right = 0
    for a in WORDS[:5]:
        for b in WORDS[5:]:
            batch = tokenizer(f"{a} {b} is", return_tensors="pt")
            theirs = model.generate(**batch, max_new_tokens=6, do_sample=False)[0, 1:]
            right += tokenizer.decode(theirs, skip_special_tokens=True) == f"{b} {a}"
            if (a, b) == (WORDS[0], WORDS[5]):
                [ours] = answers(run("generate", "--model", folder / "full", "-p", f"{a} {b} is", "--json",
                                     "--max_new_tokens", 6))
                assert ours["ids"] == theirs.tolist()
    assert right >= 20


@float32_only
@pytest.mark.parametrize("tied", [False, True])
def test_all_weights_resume(tied, tmp_path):
    """T5 1.1 with a head of its own, and 1.0 whose embedding is the head: relative biases are trained, too."""
    model = make_model(tmp_path / "model", tied=tied)
    settings = dict(finetuning_type="full", num_experts=1, max_steps=4, save_steps=2, learning_rate=1e-3)
    for name in ("whole", "cut"):
        run("train", make_run(tmp_path, name, **settings))
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    (tmp_path / "cut" / "model.safetensors").unlink()
    run("train", tmp_path / "cut.yaml", "--resume", "auto")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    run("train", make_run(tmp_path, "again", gradient_checkpointing=True, **settings))  # blocks are run twice
    trained = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "whole")
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again")
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert (trained.get_parameter(bias) != model.get_parameter(bias)).any()
    assert (trained.lm_head.weight is trained.shared.weight) == tied


def test_requests_weigh_their_adapters(folder, tmp_path):
    """Side by side, each prompt with adapters of its own, in the encoder and in keys and values made of its states."""
    run("train", make_run(folder, "one", finetuning_type="molora", lora_rank=2, learning_rate=0.1))
    run("train", make_run(folder, "two", finetuning_type="mov", learning_rate=0.3))
    asked = [{}, {"one": 1.0}, {"two": 1.0}, {"one": 0.5, "two": 1.0}]
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "adapters": adapters}) + "\n" for prompt, adapters in zip(PROMPTS, asked)))
    flags = ["--json", "--max_new_tokens", 8, "--dtype", "float32"]
    together = answers(run("generate", "--model", folder / "model", "--adapter", folder / "one", "--adapter",
                           folder / "two", "--prompts", tmp_path / "prompts.jsonl", *flags))
    for prompt, adapters, answer in zip(PROMPTS, asked, together):
        alone = [flag for name, weight in adapters.items() for flag in ("--adapter", f"{folder / name}:{weight}")]
        [expected] = answers(run("generate", "--model", folder / "model", *alone, "-p", prompt, *flags))
        assert answer["ids"] == expected["ids"]
    [plain] = answers(run("generate", "--model", folder / "model", "-p", PROMPTS[1], *flags))
    assert plain["ids"] != together[1]["ids"]


def test_prompts_without_eos(folder, reference):
    """prompt_eos: false trains as T0 did, and whoever uses the adapter asks in the same words."""
    run("train", make_run(folder, "bare", finetuning_type="ia3", num_experts=1, prompt_eos=False))
    config = json.loads((folder / "bare" / "tokenizer_config.json").read_text())
    assert config["add_eos_token"] is False
    _, tokenizer = reference
    ids = tokenizer("red one is")["input_ids"]
    for adapter, expected in (([], len(ids)), (["--adapter", folder / "bare"], len(ids) - 1)):
        [answer] = answers(run("generate", "--model", folder / "model", *adapter, "-p", "red one is", "--json",
                               "--max_new_tokens", 2))
        assert answer["prompt_tokens"] == expected


@pytest.mark.parametrize("changes, says", [
    (dict(train_on_prompt=True), "train_on_prompt: got true for an encoder-decoder"),
    (dict(finetuning_type="calm", num_experts=1), "is none of `moesaic compose`"),
])
def test_what_can_not_be(folder, changes, says):
    done = tiny_run.moesaic("train", make_run(folder, "refused", **changes))
    assert done.returncode == 2 and says in done.stderr


def test_a_text_has_no_prompt(folder):
    path = make_run(folder, "texts")
    (folder / "texts.jsonl").write_text('{"text": "red one"}\n')
    done = tiny_run.moesaic("train", path, f"dataset={folder / 'texts.jsonl'}")
    assert done.returncode == 3 and "texts.jsonl line 1: got a text without a prompt" in done.stderr


def test_float16_is_refused(folder):
    done = tiny_run.moesaic("generate", "--model", folder / "model", "-p", "red", "--dtype", "float16")
    assert done.returncode == 2 and "65504" in done.stderr


def test_merge(folder):
    run("train", make_run(folder, "merged-lora", finetuning_type="lora", num_experts=1, lora_rank=2))
    out = run("merge", "--model", folder / "model", "--adapter", folder / "merged-lora", folder / "merged")
    assert "largest logit difference" in out
    flags = ["-p", "red one is", "--json", "--max_new_tokens", 4, "--dtype", "float32"]
    [beside] = answers(run("generate", "--model", folder / "model", "--adapter", folder / "merged-lora", *flags))
    [merged] = answers(run("generate", "--model", folder / "merged", *flags))
    assert beside["ids"] == merged["ids"]


def test_a_folder_of_before_safetensors(tmp_path):
    """pytorch_model.bin, in which tied weights share their numbers, and spiece.model; exported, as folders are today."""
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 5), model_writer=pieces, vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    model = make_model(tmp_path / "old", vocab_size=160)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "old" / name).unlink()
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "spiece.model").write_bytes(pieces.getvalue())
    run("export", "--model", tmp_path / "old", "--format", "hf", tmp_path / "new", "--dtype", "float32")
    prompt = "red one\tcat  is <extra_id_0> dog"
    for name in ("old", "new"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        batch = tokenizer(prompt, return_tensors="pt")
        theirs = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, 1:].tolist()
        [answer] = answers(run("generate", "--model", tmp_path / name, "-p", prompt, "--json", "--max_new_tokens", 8,
                               "--dtype", "float32"))
        assert (answer["ids"], answer["prompt_tokens"]) == (theirs, batch["input_ids"].shape[1])
    assert len(set(theirs)) > 1
    transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "new")


def make_t5gemma(folder):
    """An encoder wider than its decoder; words with BOS in front, as Gemma's tokenizer puts it."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *WORDS]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
                                         pad_token="<pad>").save_pretrained(folder)
    half = dict(vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
    torch.manual_seed(0)
    model = transformers.T5GemmaForConditionalGeneration(transformers.T5GemmaConfig(
        encoder=half, decoder={**half, "hidden_size": 24})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 if "embed" in name else 0.7 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return model


@float32_only
def test_t5gemma(tmp_path):
    """Gemma's blocks through the same verbs: asked as transformers answers, all of it trained, read by transformers."""
    model = make_t5gemma(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    prompts = ["red one cat is", "dog", "three two one not blue green two"]
    flags = [flag for prompt in prompts for flag in ("-p", prompt)]
    ours = answers(run("generate", "--model", tmp_path / "model", *flags, "--json", "--max_new_tokens", 8))
    for prompt, answer in zip(prompts, ours, strict=True):
        batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        assert answer["prompt_tokens"] == batch["input_ids"].shape[1]
        assert answer["ids"] == model.generate(**batch, max_new_tokens=8, do_sample=False)[0, 1:].tolist()
    for name, settings in {"whole": dict(finetuning_type="full", num_experts=1, learning_rate=1e-3),
                           "lora": dict(finetuning_type="lora", num_experts=1, lora_rank=2)}.items():
        run("train", make_run(tmp_path, name, max_steps=6, **settings))
    run("merge", "--model", tmp_path / "model", "--adapter", tmp_path / "lora", tmp_path / "merged")
    for name in ("whole", "merged"):
        trained = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).eval()
        done = json.loads(run("score", "--model", tmp_path / name, "--text", prompts[0], "--target", "two dog", "--json"))
        with torch.no_grad():
            logits = trained(input_ids=torch.tensor([done["prompt_ids"]]),
                             decoder_input_ids=torch.tensor([[2, *done["ids"][:-1]]])).logits[0]
        theirs = [row[i].item() for row, i in zip(logits.log_softmax(-1), done["ids"], strict=True)]
        assert done["logprobs"] == pytest.approx(theirs, abs=1e-4)


@float32_only
def test_a_switch_is_trained(tmp_path):
    """Its routers and experts, resumed to the same bytes; LoRA of its experts; what transformers reads of it."""
    make_model(tmp_path / "dense", tied=True)
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(dict(base_model=str(tmp_path / "dense"), method="copy",
                                                           num_experts=3, experts_per_token=1)))
    run("upcycle", tmp_path / "moe.yaml", tmp_path / "model")
    changes = dict(finetuning_type="full", num_experts=None, moe_aux_loss_coef=0.01, router_z_loss_coef=0.001,
                   save_steps=4, dropout_rate=0.1, z_loss_coef=1e-4, max_steps=8, learning_rate=3e-3)
    run("train", make_run(tmp_path, "full", **changes))
    half = make_run(tmp_path, "half", **changes)
    run("train", half)
    shutil.rmtree(tmp_path / "half" / "checkpoint-8")
    (tmp_path / "half" / "model.safetensors").unlink()
    run("train", half, "--resume", "auto")
    trained = load_file(tmp_path / "full" / "model.safetensors")
    assert all(torch.equal(t, trained[n]) for n, t in load_file(tmp_path / "half" / "model.safetensors").items())
    before = load_file(tmp_path / "model" / "model.safetensors")
    moved = {n for n in before if not torch.equal(before[n], trained[n])}
    assert {"encoder.block.1.layer.1.mlp.router.classifier.weight",
            "encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight"} <= moved
    model = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "full").eval()
    reference = model, transformers.AutoTokenizer.from_pretrained(tmp_path / "full")
    ours = json.loads(run("score", "--model", tmp_path / "full", "--text", "red one cat is", "--target", "dog two",
                          "--json"))
    assert ours["logprobs"] == pytest.approx(logprobs(reference, "red one cat is", ours["ids"][-len(ours["logprobs"]):]),
                                             abs=1e-4)
    said = run("train", make_run(tmp_path, "lora", finetuning_type="lora", num_experts=None, lora_target=["wi", "wo"],
                                 dropout_rate=0.1))
    assert "wi " in said
    names = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert any("experts.expert_2.wi.lora_B" in name and t.abs().max() > 0 for name, t in names.items())
