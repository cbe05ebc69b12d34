"""Sparse models made of dense ones, in transformers: which start equal and which don't, config keys, names, refusals."""

import copy
import json
import math
import shutil

import peft
import pytest
import tokenizers
import torch
import transformers
import yaml
from safetensors.torch import load_file

import test_seq2seq
from tiny_run import WORDS, moesaic, run, train

SIZES = dict(vocab_size=13, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=None)
# Nothing here is the default of the sparse family.
BASES = {
    "llama": transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-4, head_dim=10, rope_parameters={
        "rope_type": "linear", "factor": 2.0, "rope_theta": 700.0}),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=5, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=6, rms_norm_eps=1e-4, attention_bias=True),
    "qwen2": transformers.Qwen2Config(**{**SIZES, "num_hidden_layers": 4}, use_sliding_window=True, sliding_window=4,
                                      max_window_layers=1),
}
SPARSE = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe", "qwen2": "qwen2_moe"}
IDS = torch.tensor([[0, 5, 7, 3, 9, 12, 4, 6, 11, 2, 8, 10]])
EQUAL = 2e-6  # float32


def make_base(folder, config, seed=0):
    """A random model whose every part shows in its logits, with a tokenizer."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0, 0.3) if parameter.dim() == 1 else parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>"] + WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_base(folder / name, config) for name, config in BASES.items()}


def write_keys(folder, **keys):
    path = folder / "moe.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(keys, default=str))))
    return path


def upcycle(tmp_path, base, *flags, **keys):
    out = tmp_path / "out"
    printed = run("upcycle", write_keys(tmp_path, base_model=base, **keys), out, *flags)
    return out, printed


def refused(tmp_path, **keys):
    done = moesaic("upcycle", write_keys(tmp_path, **keys), tmp_path / "out")
    assert done.returncode in (2, 3), done.stdout + done.stderr
    assert not (tmp_path / "out").exists(), "nothing is written"
    return done.stderr


def load(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True,
                                                                    dtype=torch.float32)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits[0].double()


def difference(sparse, dense):
    expected = logits(dense)
    return ((logits(sparse) - expected).abs().max() / expected.abs().max()).item()


def tensors(folder):
    return load_file(folder / "model.safetensors")


# What starts equal in which family, by the table of docs/cli.md.
EQUAL_STARTS = {
    "copy": dict(method="copy", num_experts=4),
    "copy-one-of-three": dict(method="copy", num_experts=3, experts_per_token=1),
    "copy-all": dict(method="copy", num_experts=3, experts_per_token=3, router_init_std=1.0),
    "groups": dict(method="virtual_group", num_experts=8, granularity=2),
    "groups-of-three": dict(method="virtual_group", num_experts=9, granularity=3, experts_per_token=6),
    "permuted": dict(method="drop", num_experts=4, drop={"ratio": 0}),
}


@pytest.mark.parametrize("start", EQUAL_STARTS)
@pytest.mark.parametrize("base", BASES)
def test_it_starts_equal(base, start, bases, tmp_path):
    keys = EQUAL_STARTS[start]
    out, printed = upcycle(tmp_path, bases[base], **keys)
    sparse = load(out)
    assert sparse.config.model_type == SPARSE[base]
    assert difference(sparse, load(bases[base])) < EQUAL
    assert "start       equal" in printed


def test_residual_starts_equal_where_there_is_a_shared_expert(bases, tmp_path):
    out, printed = upcycle(tmp_path, bases["qwen2"], method="residual", num_experts=5)
    assert difference(load(out), load(bases["qwen2"])) < 1e-6
    assert "start       equal" in printed and "beside a shared one of width 48" in printed
    stored, dense = tensors(out), tensors(bases["qwen2"])
    layer = "model.layers.1.mlp."
    assert torch.equal(stored[layer + "shared_expert.down_proj.weight"], 2 * dense[layer + "down_proj.weight"])
    assert torch.equal(stored[layer + "experts.3.gate_proj.weight"], dense[layer + "gate_proj.weight"])
    assert not stored[layer + "experts.3.down_proj.weight"].any() and not stored[layer + "shared_expert_gate.weight"].any()


@pytest.mark.parametrize("keys", [dict(method="copy", noise=0.05), dict(method="drop"),
                                  dict(method="drop", drop={"ratio": 0.25, "independent": True})], ids=str)
def test_what_differs_by_intent_says_so(keys, bases, tmp_path):
    out, printed = upcycle(tmp_path, bases["llama"], num_experts=4, **keys)
    assert difference(load(out), load(bases["llama"])) > 0.01
    assert "start       equal:" not in printed
    stored = tensors(out)
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    assert not torch.equal(stored[name.format(0)], stored[name.format(1)])


def test_drop_draws_a_share_of_the_width_anew_from_what_it_replaces(tmp_path):
    base = make_base(tmp_path / "wide", transformers.LlamaConfig(**{**SIZES, "intermediate_size": 1000}))
    out, _ = upcycle(tmp_path, base, method="drop", num_experts=2, drop={"ratio": 0.3}, seed=3)
    dense, stored = tensors(base), tensors(out)
    for part, ours in [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")]:
        rows, fresh = dense[f"model.layers.0.mlp.{part}.weight"], []
        if part == "down_proj":
            rows = rows.T
        known = {tuple(row) for row in rows.tolist()}
        expert = stored[f"model.layers.0.block_sparse_moe.experts.0.{ours}.weight"]
        expert = expert.T if part == "down_proj" else expert
        fresh = torch.tensor([tuple(row.tolist()) not in known for row in expert])
        assert fresh.sum() == 300
        places = fresh if part == "gate_proj" else places
        assert torch.equal(fresh, places), "one choice of positions for the three matrices"
        assert expert[fresh].std() == pytest.approx(rows.std().item(), rel=0.05)


def test_groups_are_slices_and_the_router_chooses_whole_copies(bases, tmp_path):
    out, _ = upcycle(tmp_path, bases["llama"], method="virtual_group", num_experts=6, granularity=3)
    dense, stored = tensors(bases["llama"]), tensors(out)
    layer = "model.layers.1.block_sparse_moe."
    gate, down = (dense[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "down"))
    for e in range(6):
        rows = slice(16 * (e % 3), 16 * (e % 3 + 1))
        assert torch.equal(stored[layer + f"experts.{e}.w1.weight"], gate[rows])
        assert torch.equal(stored[layer + f"experts.{e}.w2.weight"], 3 * down[:, rows])
    router = stored[layer + "gate.weight"]
    assert torch.equal(router[0], router[2]) and torch.equal(router[3], router[5]) and not torch.equal(router[2], router[3])
    config = json.loads((out / "config.json").read_text())
    assert config["num_experts_per_tok"] == 3 and config["intermediate_size"] == 16


@pytest.mark.parametrize("base", BASES)
def test_every_config_key_is_carried_and_names_are_those_of_transformers_4(base, bases, tmp_path):
    out, _ = upcycle(tmp_path, bases[base], method="copy", num_experts=4)
    dense, sparse = (json.loads((folder / "config.json").read_text()) for folder in (bases[base], out))
    changed = {"architectures", "model_type"}
    assert {key: value for key, value in sparse.items() if key in dense and key not in changed} == {
        key: value for key, value in dense.items() if key not in changed}
    assert sparse["rope_theta"] == sparse["rope_parameters"]["rope_theta"] and "rope_scaling" in sparse
    assert sparse["num_local_experts"] == 4 and sparse["num_experts_per_tok"] == 2
    if base.startswith("qwen"):
        assert sparse["num_experts"] == 4 and sparse["norm_topk_prob"] is True
        assert sparse["moe_intermediate_size"] == sparse["intermediate_size"] == 48
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).exists(), name
    load(out).save_pretrained(tmp_path / "theirs")
    ours, theirs = tensors(out), tensors(tmp_path / "theirs")
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_the_base_leaves_to_its_defaults_is_written_out(bases, tmp_path):
    base = tmp_path / "silent"
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 4})
    make_base(base, config)
    written = json.loads((base / "config.json").read_text())
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_parameters",
                "tie_word_embeddings", "hidden_act"):
        written.pop(key, None)
    (base / "config.json").write_text(json.dumps(written))
    out, _ = upcycle(tmp_path, base, method="copy", num_experts=2)
    assert difference(load(out), load(base)) < EQUAL
    config = json.loads((out / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-6 and config["rope_theta"] == 10000.0 and config["num_key_value_heads"] == 4


def test_a_window_of_all_layers_is_held_by_qwen3_moe(tmp_path):
    base = make_base(tmp_path / "base", transformers.Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4,
                                                                 max_window_layers=0))
    out, _ = upcycle(tmp_path, base, method="copy", num_experts=2)
    assert difference(load(out), load(base)) < EQUAL
    full = load(base)
    full.config.layer_types = ["full_attention"] * 2
    for layer in full.model.layers:
        layer.self_attn.sliding_window = None
    assert difference(load(out), full) > 0.01, "the window shows"


def test_a_seed_gives_the_same_files_and_another_one_others(bases, tmp_path):
    made = []
    for number, seed in enumerate([3, 3, 4]):
        out = tmp_path / str(number)
        run("upcycle", write_keys(tmp_path, base_model=bases["llama"], method="drop", num_experts=2), out, f"seed={seed}")
        made.append((out / "model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]


def test_the_receipt_counts_and_the_dtype_is_the_one_asked_for(bases, tmp_path):
    out, printed = upcycle(tmp_path, bases["llama"], method="copy", num_experts=4, dtype="bfloat16")
    model = load(out)
    parameters = sum(p.numel() for p in model.parameters())
    active = parameters - 2 * 2 * 3 * 32 * 48
    assert f"parameters  {parameters}, of which {active} " in printed
    assert f"{2 * parameters} bytes, bfloat16" in printed and "rounded to bfloat16" in printed
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors(out).values())


REFUSED = {
    "gemma": (transformers.GemmaConfig(**SIZES), {}, "gemma"),
    "attention_bias": (transformers.LlamaConfig(**SIZES, attention_bias=True), {}, "attention_bias: got true"),
    "mlp_bias": (transformers.LlamaConfig(**SIZES, mlp_bias=True), {}, "mlp_bias: got true"),
    "windows": (transformers.Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1), {},
                "layer_types"),
    "sparse": (transformers.MixtralConfig(**SIZES, num_local_experts=2), {}, "sparse already"),
    "residual": (transformers.LlamaConfig(**SIZES), dict(method="residual"), "no shared expert"),
    "granularity": (transformers.LlamaConfig(**SIZES), dict(method="virtual_group", granularity=5, num_experts=5),
                    "expected a divisor of 48"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_family_cannot_hold_is_refused(case, tmp_path):
    config, keys, message = REFUSED[case]
    base = tmp_path / "base"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    assert message in refused(tmp_path, base_model=base, **{"method": "copy", "num_experts": 4, **keys})


def seq2seq_logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, decoder_input_ids=torch.tensor([[0, 4, 9, 2, 7]])).logits[0].double()


def test_a_t5_becomes_a_switch(tmp_path):
    """Every second layer of both halves; near the dense model where the router starts near nothing."""
    dense = test_seq2seq.make_model(tmp_path / "base", tied=True, num_layers=4, num_decoder_layers=3)
    out, printed = upcycle(tmp_path, tmp_path / "base", "--check-equal", method="copy", num_experts=4,
                           experts_per_token=1, router_init_std=1e-4, expert_capacity=40)
    model, info = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert (model.config.num_experts, model.config.expert_capacity) == (4, 40)
    assert sorted(name for name in tensors(out) if "router" in name) == [
        f"{place}.mlp.router.classifier.weight" for place in ("decoder.block.1.layer.2", "encoder.block.1.layer.1",
                                                              "encoder.block.3.layer.1")]
    expected = seq2seq_logits(dense)
    apart = ((seq2seq_logits(model.eval()) - expected).abs().max() / expected.abs().max()).item()
    assert 0 < apart < 5e-3, apart
    assert "switch_transformers, 3 layers" in printed and "near the dense model" in printed
    assert float(printed.split("of its largest logit:")[1].split()[0]) < 5e-3
    sizes = json.loads(run("inspect", out, "--json"))
    assert f"of which {sizes['active_parameters']} " in printed and f"parameters  {sizes['total_parameters']}," in printed
    gated = tmp_path / "gated"
    test_seq2seq.make_model(gated)
    keys = dict(base_model=gated, method="copy", num_experts=4, experts_per_token=1)
    shutil.rmtree(out)
    assert "got a gated network" in refused(tmp_path, **keys)
    keys["base_model"] = tmp_path / "base"
    assert "Switch has one for each token" in refused(tmp_path, **{**keys, "experts_per_token": 2})
    assert "method: got drop for a T5" in refused(tmp_path, **{**keys, "method": "drop"})


def test_a_capacity_is_a_switchs(bases, tmp_path):
    assert "only Switch's experts" in refused(tmp_path, base_model=bases["llama"], method="copy", num_experts=2,
                                              expert_capacity=3)


@pytest.mark.parametrize("keys, message", [
    (dict(method="copy", num_expert=4), "'num_expert' (did you mean 'num_experts'?)"),
    (dict(num_experts=4), "key 'method' is missing, expected one of copy"),
    (dict(method="copied", num_experts=4), "method: got 'copied'"),
    (dict(method="copy"), "key 'num_experts' is missing"),
    (dict(method="copy", num_experts=0), "num_experts: got 0"),
    (dict(method="copy", num_experts=2, experts_per_token=3), "experts_per_token: got 3"),
    (dict(method="copy", num_experts=2, granularity=2), "granularity is a key of method virtual_group, got method copy"),
    (dict(method="copy", num_experts=2, router_init_std=0), "router_init_std: got 0"),
    (dict(method="copy", num_experts=2, dtype="int8"), "dtype: got 'int8'"),
    (dict(method="drop", num_experts=2, drop={"share": 1}), "'share'"),
    (dict(method="drop", num_experts=2, drop={"ratio": 1.5}), "ratio: got 1.5"),
    (dict(method="virtual_group", num_experts=6, granularity=4), "multiples of granularity 4"),
    (dict(method="lora"), "adapters"),
    (dict(experts=[]), "experts: got none"),
    (dict(experts=[{"source_model": "x"}] * 2), "has no positive_prompts"),
    (dict(experts=[{"source_models": "x"}]), "did you mean 'source_model'?"),
    (dict(gate_mode="hiden", experts=[{"source_model": "x"}] * 2), "gate_mode: got 'hiden'"),
], ids=str)
def test_wrong_keys_are_named(keys, message, bases, tmp_path):
    assert message in refused(tmp_path, base_model=bases["llama"], **keys)


def test_a_folder_with_work_in_it_is_refused(bases, tmp_path):
    done = moesaic("upcycle", write_keys(tmp_path, base_model=bases["llama"], method="copy", num_experts=2),
                   bases["llama"])
    assert done.returncode == 2
    out, _ = upcycle(tmp_path, bases["llama"], method="copy", num_experts=2)
    before = (out / "model.safetensors").read_bytes()
    assert moesaic("upcycle", tmp_path / "moe.yaml", out, "seed=9").returncode == 2
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("keys", [dict(method="copy", num_experts=4),
                                  dict(method="virtual_group", num_experts=8, granularity=2)], ids=lambda k: k["method"])
def test_our_own_run_of_it_is_the_dense_models(base, keys, bases, tmp_path):
    _, printed = upcycle(tmp_path, bases[base], "--check-equal", **keys)
    assert float(printed.split("largest logit: ")[1]) < 1e-5


def test_check_equal_is_an_error_only_where_equality_was_promised(bases, tmp_path):
    _, printed = upcycle(tmp_path, bases["llama"], "--check-equal", method="drop", num_experts=2)
    assert float(printed.split("largest logit: ")[1]) > 0.01
    assert "not equal by intent" in printed


# LoRA experts

def make_adapter(base, folder, targets, seed, zero=False):
    model = peft.get_peft_model(load(base), peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets,
                                                            alpha_pattern={"up_proj": 2}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and not zero:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def merged(base, adapter):
    return peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload()


FFN = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("base", ["llama", "qwen2", "qwen3"])
def test_lora_experts_are_the_base_with_an_adapter_each(base, bases, tmp_path):
    adapters = [make_adapter(bases[base], tmp_path / str(e), FFN, e) for e in range(3)]
    out, printed = upcycle(tmp_path, bases[base], method="lora", adapters=adapters)
    assert "not equal by intent" in printed
    sparse, dense = load(out), load(bases[base])
    assert difference(sparse, dense) > 0.01
    # A router that always chooses expert e makes the model that e is.
    for e, adapter in enumerate(adapters):
        chosen = copy.deepcopy(sparse)
        chosen.config.num_experts_per_tok = 1
        for layer in chosen.model.layers:
            gate = layer.mlp.gate
            gate.top_k = 1
            gate.weight.data.zero_()
            gate.forward = one_hot_router(gate, e)
        assert difference(chosen, merged(bases[base], adapter)) < EQUAL


def one_hot_router(gate, e):
    def forward(x):
        rows = x.reshape(-1, x.shape[-1]).shape[0]
        return (torch.zeros(rows, gate.weight.shape[0]), torch.ones(rows, 1), torch.full((rows, 1), e))
    return forward


def test_equal_adapters_start_equal_and_attention_is_averaged_or_dropped(bases, tmp_path):
    targets = [*FFN, "q_proj", "v_proj"]
    same = make_adapter(bases["llama"], tmp_path / "a", targets, 1)
    assert "attention: average" in refused(tmp_path, base_model=bases["llama"], method="lora", adapters=[same, same])
    out, _ = upcycle(tmp_path, bases["llama"], method="lora", adapters=[same, same], attention="average")
    assert difference(load(out), merged(bases["llama"], same)) < EQUAL
    other = make_adapter(bases["llama"], tmp_path / "b", targets, 2)
    run("upcycle", write_keys(tmp_path, base_model=bases["llama"], method="lora", adapters=[same, other],
                              attention="drop"), tmp_path / "dropped")
    run("upcycle", tmp_path / "moe.yaml", tmp_path / "mean", "attention=average")
    name = "model.layers.1.self_attn.q_proj.weight"
    dense, dropped, mean = (tensors(folder)[name] for folder in (bases["llama"], tmp_path / "dropped", tmp_path / "mean"))
    assert torch.equal(dropped, dense)
    each = [merged(bases["llama"], folder).state_dict()[name] for folder in (same, other)]
    torch.testing.assert_close(mean, sum(each) / 2)


def test_adapters_that_have_learnt_nothing_start_equal(bases, tmp_path):
    fresh = [make_adapter(bases["mistral"], tmp_path / str(e), FFN, e, zero=True) for e in range(2)]
    out, printed = upcycle(tmp_path, bases["mistral"], method="lora", adapters=fresh)
    assert difference(load(out), load(bases["mistral"])) < EQUAL and "start       equal" in printed


def test_an_adapter_that_an_expert_cannot_hold_is_refused(bases, tmp_path):
    model = peft.get_peft_model(load(bases["llama"]), peft.LoraConfig(r=2, target_modules=FFN, modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "head")
    assert "lm_head" in refused(tmp_path, base_model=bases["llama"], method="lora", adapters=[tmp_path / "head"] * 2)
    model = peft.get_peft_model(load(bases["llama"]), peft.IA3Config(target_modules=FFN, feedforward_modules=FFN))
    model.save_pretrained(tmp_path / "ia3")
    assert "expected lora" in refused(tmp_path, base_model=bases["llama"], method="lora", adapters=[tmp_path / "ia3"] * 2)


def test_our_own_adapters_are_taken_and_one_of_other_weights_is_named(tmp_path):
    train(tmp_path, "lora", finetuning_type="lora", num_experts=None, lora_target=FFN)
    run("upcycle", write_keys(tmp_path, base_model=tmp_path / "model", method="lora", adapters=[tmp_path / "lora"] * 2),
        tmp_path / "out")
    merged_folder = tmp_path / "merged"
    run("merge", tmp_path / "lora", merged_folder)
    assert difference(load(tmp_path / "out"), load(merged_folder)) < EQUAL
    done = moesaic("upcycle", tmp_path / "moe.yaml", tmp_path / "other", f"base_model={merged_folder}")
    assert done.returncode == 0 and "was trained on other weights" in done.stderr


# mergekit-moe's files

PROMPTS = [(["red green", "cat is not dog"], []), (["one two three one", "two"], ["blue", "red red one"]), (["dog"], [])]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return [make_base(folder / str(e), BASES["llama"], seed=e + 1) for e in range(3)]


def their_file(base, sources, mode, **keys):
    experts = [{"source_model": source, "positive_prompts": positive, **({"negative_prompts": negative} if negative else {})}
               for source, (positive, negative) in zip(sources, PROMPTS)]
    return dict(base_model=base, gate_mode=mode, experts=experts, **keys)


def expected_gates(base, mode):
    """mergekit-moe's formula, prompts one by one: [layers, experts, width]."""
    model, tokenizer = load(base).double(), transformers.PreTrainedTokenizerFast.from_pretrained(base)
    layers = model.config.num_hidden_layers

    def state(prompt):
        ids = tokenizer("<s>" + prompt, add_special_tokens=False, return_tensors="pt").input_ids
        if mode == "cheap_embed":
            return model.model.embed_tokens(ids)[0].sum(0).expand(layers, -1)
        hidden = torch.stack(model(ids, output_hidden_states=True).hidden_states[:-1])[:, 0]
        return hidden.mean(1) if mode == "hidden_avg" else hidden[:, -1]

    def states(prompts):
        all_states = torch.stack([state(prompt) for prompt in prompts])
        return all_states.mean(0) if mode != "cheap_embed" else unit(all_states.sum(0))

    def unit(rows):
        return rows / rows.norm(dim=-1, keepdim=True)

    with torch.no_grad():
        rows = [unit(states(positive) - (states(negative) if negative else 0)) for positive, negative in PROMPTS]
    return torch.stack(rows, 1)


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "cheap_embed"])
def test_gates_are_those_of_mergekits_formula(mode, bases, sources, tmp_path):
    out = tmp_path / "out"
    run("upcycle", write_keys(tmp_path, **their_file(bases["llama"], sources, mode)), out)
    expected, stored = expected_gates(bases["llama"], mode), tensors(out)
    for layer, gate in enumerate(expected):
        ours = stored[f"model.layers.{layer}.block_sparse_moe.gate.weight"].double()
        assert (ours - gate).abs().max() < 1e-5 * gate.abs().max()
    for e, source in enumerate(sources):
        assert torch.equal(stored[f"model.layers.1.block_sparse_moe.experts.{e}.w3.weight"],
                           tensors(source)["model.layers.1.mlp.up_proj.weight"])
    for name, tensor in tensors(bases["llama"]).items():
        assert ".mlp." in name or torch.equal(stored[name], tensor), "everything else is the base's"
    load(out)


def test_random_gates_noise_and_scale(bases, sources, tmp_path):
    keys = their_file(bases["llama"], sources, "random", dtype="float32", experts_per_token=1, architecture="mixtral")
    for expert in keys["experts"]:
        expert.pop("positive_prompts")
    keys["experts"][1].update(noise_scale=0.1, residual_scale=0.5)
    run("upcycle", write_keys(tmp_path, **keys), tmp_path / "out")
    stored, source = tensors(tmp_path / "out"), tensors(sources[1])
    layer = "model.layers.0.block_sparse_moe."
    noise = stored[layer + "experts.1.w1.weight"] - source["model.layers.0.mlp.gate_proj.weight"]
    assert noise.std() == pytest.approx(0.1, rel=0.1)
    noise = stored[layer + "experts.1.w2.weight"] / 0.5 - source["model.layers.0.mlp.down_proj.weight"]
    assert noise.std() == pytest.approx(0.1, rel=0.1)
    assert stored[layer + "gate.weight"].std() == pytest.approx(1.0, rel=0.3)
    run("upcycle", tmp_path / "moe.yaml", tmp_path / "uniform", "gate_mode=uniform_random")
    gate = tensors(tmp_path / "uniform")[layer + "gate.weight"]
    assert 0.8 / math.sqrt(32) < gate.abs().max() <= 1 / math.sqrt(32)


def test_a_shared_expert_of_qwen_has_a_gate_of_its_prompts(bases, tmp_path):
    source = make_base(tmp_path / "source", BASES["qwen2"], seed=5)
    keys = their_file(bases["qwen2"], [source, bases["qwen2"], source], "cheap_embed")
    keys["shared_experts"] = [{"source_model": source, "positive_prompts": PROMPTS[1][0],
                               "negative_prompts": PROMPTS[1][1]}]
    run("upcycle", write_keys(tmp_path, **keys), tmp_path / "out")
    stored = tensors(tmp_path / "out")
    expected = expected_gates(bases["qwen2"], "cheap_embed")[2, 1]
    torch.testing.assert_close(stored["model.layers.2.mlp.shared_expert_gate.weight"][0].double(), expected, rtol=1e-5,
                               atol=1e-6)
    assert torch.equal(stored["model.layers.2.mlp.shared_expert.up_proj.weight"],
                       tensors(source)["model.layers.2.mlp.up_proj.weight"])
    load(tmp_path / "out")
    llama = their_file(bases["llama"], [bases["llama"]] * 3, "random", shared_experts=keys["shared_experts"])
    assert "shared_experts: got 1, but mixtral has none" in refused(tmp_path / "source", **llama)


def test_a_source_of_other_sizes_or_another_family_is_refused(bases, sources, tmp_path):
    wide = make_base(tmp_path / "wide", transformers.LlamaConfig(**{**SIZES, "intermediate_size": 64}))
    assert "expected the base's [2, 48, 32]" in refused(
        tmp_path, **their_file(bases["llama"], [*sources[:2], wide], "random"))
    assert "becomes qwen3_moe" in refused(tmp_path, **their_file(bases["llama"], [*sources[:2], bases["qwen3"]], "random"))
    assert "architecture: got qwen" in refused(
        tmp_path, **their_file(bases["llama"], sources, "random", architecture="qwen"))
