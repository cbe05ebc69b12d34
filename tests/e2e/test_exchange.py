"""Merged and exported models and adapters in the libraries they are for: transformers and PEFT load them, same numbers."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import tiny_run

IDS = [0, 5, 7, 3, 9, 12, 4, 6, 11]
METHODS = {
    "lora": dict(finetuning_type="lora", num_experts=1),
    "ia3": dict(finetuning_type="ia3", num_experts=1),
    "molora": dict(finetuning_type="molora", num_experts=3),
    "mov": dict(finetuning_type="mov", num_experts=2),
    "molora-by-layer": dict(finetuning_type="molora", num_experts={"0": 3, "1": 1}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exchange")


@pytest.fixture(scope="module")
def adapter(folder):
    """The folder of a method's trained adapter; trained once."""
    def trained(method):
        path = folder / method
        return path if path.exists() else tiny_run.train(folder, method, **METHODS[method])
    return trained


def ours(folder, *flags):
    flags = ["--ids", ",".join(map(str, IDS)), "--dtype", "float32", "--json", *flags]
    return json.loads(tiny_run.run("score", "--model", folder / "model", *flags))["logprobs"]


def theirs(model):
    with torch.no_grad():
        table = model.eval()(torch.tensor([IDS])).logits[0].float().log_softmax(-1)
    return [table[i, IDS[i + 1]].item() for i in range(len(IDS) - 1)]


def base_model(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def differ(a, b):
    return max(abs(x - y) for x, y in zip(a, b)) > 0.01


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_merged_folder_is_the_base_with_the_adapter(method, folder, adapter, tmp_path):
    out = tmp_path / "merged"
    printed = tiny_run.run("merge", "--model", folder / "model", "--adapter", adapter(method), out)
    assert "largest logit difference" in printed
    expected = ours(folder, "--adapter", adapter(method))
    assert differ(expected, ours(folder))
    assert theirs(base_model(out)) == pytest.approx(expected, abs=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(out)("red cat")["input_ids"] == [3, 9]
    again = tiny_run.moesaic("merge", "--model", folder / "model", "--adapter", adapter(method), out)
    assert again.returncode == 2 and "holds config.json" in again.stderr


@pytest.mark.parametrize("method", ["molora", "mov", "molora-by-layer"])
def test_a_mixture_is_not_merged(method, folder, adapter, tmp_path):
    for command in (["merge"], ["export", "--format", "hf"]):
        done = tiny_run.moesaic(*command, "--model", folder / "model", "--adapter", adapter(method), tmp_path / "out")
        assert done.returncode == 2
        assert "its router mixes the experts anew for every token" in done.stderr
        assert not (tmp_path / "out").exists()


def test_exported_model(folder, adapter, tmp_path):
    tiny_run.run("export", "--model", folder / "model", "--format", "hf", tmp_path / "plain")
    assert theirs(base_model(tmp_path / "plain")) == pytest.approx(ours(folder), abs=1e-4)
    tiny_run.run("export", "--model", folder / "model", "--adapter", adapter("lora"), "--format", "hf", tmp_path / "both")
    assert theirs(base_model(tmp_path / "both")) == pytest.approx(ours(folder, "--adapter", adapter("lora")), abs=1e-4)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_exported_adapter(method, folder, adapter, tmp_path):
    out = tmp_path / "peft"
    assert tiny_run.run("export", "--adapter", adapter(method), "--format", "peft", out) == f"{out}\n"
    wrapped = peft.PeftModel.from_pretrained(base_model(folder / "model"), out)
    assert theirs(wrapped) == pytest.approx(ours(folder, "--adapter", adapter(method)), abs=1e-4)


@pytest.mark.parametrize("method, experts", [("molora", 3), ("mov", 2), ("molora-by-layer", 3)])
def test_exported_experts_load_one_by_one(method, experts, folder, adapter, tmp_path):
    out = tmp_path / "peft"
    written = tiny_run.run("export", "--adapter", adapter(method), "--format", "peft", out).split()
    assert written == [str(out / f"expert_{e}") for e in range(experts)]
    stacked = load_file(adapter(method) / "adapter_model.safetensors")
    routers = load_file(out / "router.safetensors")
    assert {f"base_model.model.{k}" for k in routers} == {k for k in stacked if k.endswith("router.weight")}
    base, scores = ours(folder), []
    for e, path in enumerate(written):
        wrapped = peft.PeftModel.from_pretrained(base_model(folder / "model"), path)
        tensors = {k: v for k, v in stacked.items() if "router" not in k and v.shape[0] > e}
        trained = [p for n, p in wrapped.named_parameters() if "lora_" in n or "ia3_l" in n]
        assert len(trained) == len(tensors) > 0
        assert sum(p.numel() for p in trained) == sum(v[e].numel() for v in tensors.values())
        scores.append(theirs(wrapped))
        assert scores[-1] == pytest.approx(ours(folder, "--adapter", path), abs=1e-4)
        assert differ(scores[-1], base)
    assert differ(scores[0], scores[1])


def test_int8_generates_what_rounded_weights_generate(folder, adapter, monkeypatch):
    # With AVX512 a prompt's activations have 8 bits, which on so small a model changes tokens.
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    adapter("lora")  # makes the model
    rounded = base_model(folder / "model")
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            module.weight = torch.nn.Parameter((module.weight.detach() / scale).round() * scale)
    assert theirs(rounded) == pytest.approx(ours(folder, "--quantize", "int8"), abs=1e-3)
    assert differ(theirs(rounded), ours(folder))
    prompt = transformers.AutoTokenizer.from_pretrained(folder / "model")("red cat is not")["input_ids"]
    expected = rounded.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt):].tolist()
    line = tiny_run.run("generate", "--model", folder / "model", "-p", "red cat is not", "--quantize", "int8", "--json",
                        "--dtype", "float32", "--max_new_tokens", 12)
    assert json.loads(line)["ids"] == expected


# What acts through weights of the model as a whole.
WHOLE = {
    "dora": dict(use_dora=True, target_modules="all-linear"),
    "biases": dict(bias="lora_only", target_modules=["q_proj", "down_proj"]),
    "embedding": dict(target_modules=["embed_tokens", "lm_head", "v_proj"]),
    "head": dict(modules_to_save=["lm_head"], target_modules=["v_proj"]),
}


def disturbed(wrapped):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return wrapped


@pytest.mark.parametrize("kind", WHOLE)
def test_adapters_that_replace_weights(kind, tmp_path):
    tiny_run.make_model(tmp_path / "model", initializer_range=0.3, attention_bias=True, mlp_bias=True)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, **WHOLE[kind])
    wrapped = disturbed(peft.get_peft_model(base_model(tmp_path / "model"), config))
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = theirs(wrapped)
    assert differ(expected, ours(tmp_path))
    assert ours(tmp_path, "--adapter", tmp_path / "adapter") == pytest.approx(expected, abs=1e-4)

    tiny_run.run("merge", "--model", tmp_path / "model", "--adapter", tmp_path / "adapter", tmp_path / "merged")
    assert theirs(base_model(tmp_path / "merged")) == pytest.approx(expected, abs=1e-4)
    tiny_run.run("export", "--adapter", tmp_path / "adapter", "--format", "peft", tmp_path / "again")
    again = peft.PeftModel.from_pretrained(base_model(tmp_path / "model"), tmp_path / "again")
    assert theirs(again) == pytest.approx(expected, abs=1e-4)

    (tmp_path / "rows.jsonl").write_text(json.dumps({"inputs": "red ", "targets": "cat"}) + "\n")
    run = tiny_run.make_run(tmp_path, adapter_name_or_path=str(tmp_path / "adapter"), finetuning_type="lora",
                            num_experts=None, lora_rank=None, lora_dropout=None)
    done = tiny_run.moesaic("train", run)
    assert done.returncode == 2 and "is used, not trained" in done.stderr, done.stderr


def test_an_adapter_with_new_tokens(tmp_path):
    """As after add_tokens() and resize_token_embeddings(): the embedding, the head and the tokenizer are the adapter's."""
    tiny_run.make_model(tmp_path / "model", initializer_range=0.3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["<new>", "<other>"])
    model = base_model(tmp_path / "model")
    model.resize_token_embeddings(len(tokenizer))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"],
                                                         modules_to_save=["embed_tokens", "lm_head"]))
    disturbed(wrapped).eval().save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    prompt = tokenizer("red <new> is")["input_ids"]
    assert len(tokenizer) - 2 in prompt
    expected = wrapped.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt):].tolist()

    asked = ["-p", "red <new> is", "--json", "--dtype", "float32", "--max_new_tokens", 8]
    line = tiny_run.run("generate", "--model", tmp_path / "model", "--adapter", tmp_path / "adapter", *asked)
    assert json.loads(line)["ids"] == expected and json.loads(line)["prompt_tokens"] == len(prompt)
    tiny_run.run("merge", "--model", tmp_path / "model", "--adapter", tmp_path / "adapter", tmp_path / "merged")
    assert json.loads(tiny_run.run("generate", "--model", tmp_path / "merged", *asked))["ids"] == expected
    merged = base_model(tmp_path / "merged")
    assert merged.config.vocab_size == len(transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tokenizer)
    assert merged.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt):].tolist() == expected
