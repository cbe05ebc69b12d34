"""LoRA and (IA)^3 against PEFT: its adapters here, and ours in PEFT; logits and every gradient."""

import shutil
import subprocess

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

import common

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
T5_LINEARS = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
ALL = common.ARCHITECTURES + common.SEQ2SEQ
LORA = {
    "all-linear": dict(r=3, lora_alpha=7, target_modules=ALL_LINEAR),
    "two-modules": dict(r=5, lora_alpha=5, target_modules=["q_proj", "v_proj"]),
    "rslora": dict(r=3, lora_alpha=4, use_rslora=True, target_modules=ALL_LINEAR),
    "patterns": dict(r=2, lora_alpha=4, target_modules=ALL_LINEAR,
                     rank_pattern={"down_proj": 5, "layers.1.self_attn.q_proj": 4},
                     alpha_pattern={"^model.layers.0.mlp.gate_proj": 9, "v_proj": 1}),
    "regex": dict(r=2, lora_alpha=3, target_modules=r".*layers\.[02]\.(self_attn\.[qo]_proj|mlp\.up_proj)"),
    "suffixes": dict(r=2, lora_alpha=3, target_modules=["mlp.gate_proj", "self_attn.k_proj"],
                     layers_to_transform=[0, 2]),
    "excluded": dict(r=2, lora_alpha=3, target_modules=ALL_LINEAR, exclude_modules=["o_proj"]),
}
IA3 = {
    "default": dict(),
    "no-feedforward": dict(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    "queries": dict(target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "down-output": dict(target_modules=["v_proj", "down_proj"], feedforward_modules=[]),
    "every-output": dict(target_modules=["q_proj", "o_proj", "gate_proj", "up_proj"], feedforward_modules=[]),
    "other-inputs": dict(target_modules=["o_proj", "down_proj"], feedforward_modules=["o_proj", "down_proj"]),
    "shared-inputs": dict(target_modules=["q_proj", "k_proj", "v_proj", "up_proj"],
                          feedforward_modules=["q_proj", "v_proj", "up_proj"]),
}


def linears_of(name):
    """Every linear but the head. PEFT finds none in an expert: transformers 5 keeps those of a layer in one tensor."""
    if name in common.SPARSE and name != "qwen2_moe":
        return ALL_LINEAR[:4]
    if name not in common.SEQ2SEQ or name.startswith("t5gemma"):
        return ALL_LINEAR
    return ["q", "k", "v", "o", "wi", "wo"] if name == "t5" else T5_LINEARS


OF_IMAGES = {"t5gemma2": r".*vision_tower.*"}  # whose linears have the same names


def task_of(name):
    return "SEQ_2_SEQ_LM" if name in common.SEQ2SEQ else "CAUSAL_LM"


def peft_model(name, config, seed=5):
    """A PEFT model whose adapter is far from its start state."""
    wrapped = peft.get_peft_model(common.make_model(name), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, p in wrapped.named_parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(1 + 0.4 * noise if "ia3" in parameter_name else 0.6 * noise / p.shape[1] ** 0.5)
    return wrapped.eval()


def file_name(parameter_name):
    """PEFT's parameter name -> the key in our driver's answer."""
    return parameter_name.removeprefix("base_model.model.").replace(".default", "")


def check_peft_adapter_here(name, config, driver, models, tmp_path):
    _, folder = models(name)
    wrapped = peft_model(name, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = common.sequences()
    mask = common.masks(ids)
    logits, loss, gradients = common.reference_gradients(wrapped, ids, mask)
    base = common.reference_logits(models(name)[0], ids)
    assert (logits - base).abs().max() > 0.05 * base.abs().max(), "the adapter has no effect"
    ours = driver.run(tmp_path / "out.safetensors", model=folder, adapter=tmp_path / "adapter", mode="adapter",
                      sequences=ids, mask=mask)
    common.assert_close(ours["logits"], logits, "logits")
    common.assert_close(ours["loss"], loss, "loss")
    common.assert_gradients_close(common.split_gradients(ours), {file_name(n): g for n, g in gradients.items()})


@pytest.mark.parametrize("name", ALL + common.SPARSE)
def test_lora_of_peft(name, driver, models, tmp_path):
    config = peft.LoraConfig(task_type=task_of(name), exclude_modules=OF_IMAGES.get(name),
                             **{**LORA["all-linear"], "target_modules": linears_of(name)})
    check_peft_adapter_here(name, config, driver, models, tmp_path)


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj", "gate_up_proj"], ["gate_up_proj"],
                                        ["down_proj"]], ids=lambda names: "-".join(names))
@pytest.mark.parametrize("name, modules", [("mixtral", ["q_proj", "v_proj"]), ("qwen2_moe", r".*self_attn\.[qo]_proj"),
                                           ("qwen3_moe", None), ("granitemoe", ["o_proj"])])
def test_lora_of_experts(name, modules, parameters, driver, models, tmp_path):
    """All experts of a layer adapted in one tensor; merged, too."""
    block = "block_sparse_moe" if name == "granitemoe" else "mlp"
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules=modules or [],
                             target_parameters=[f"{block}.experts.{p}" for p in parameters])
    model, folder = models(name)
    wrapped = peft_model(name, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = common.sequences()
    with torch.no_grad():
        logits, base = common.reference_logits(wrapped, ids), common.reference_logits(model, ids)
    assert (logits - base).abs().max() > 0.05 * base.abs().max(), "the adapter has no effect"
    ours = driver.run(tmp_path / "out.safetensors", model=folder, adapter=tmp_path / "adapter", sequences=ids,
                      mask=common.masks(ids), save_adapter=tmp_path / "again")
    common.assert_close(ours["logits"], logits, "logits")
    again = driver.run(tmp_path / "out.safetensors", model=folder, adapter=tmp_path / "again", sequences=ids,
                       mask=common.masks(ids))
    assert torch.equal(again["logits"], ours["logits"])
    subprocess.run([common.BUILD / "moesaic", "merge", "--model", folder, tmp_path / "adapter", tmp_path / "merged"],
                   check=True)
    merged = driver.run(tmp_path / "out.safetensors", model=tmp_path / "merged", sequences=ids, mask=common.masks(ids))
    common.assert_close(merged["logits"], logits, "logits of the merged model")


def test_a_t5gemma2_is_merged_with_what_it_reads_images_with(models, tmp_path):
    model, folder = models("t5gemma2")
    wrapped = peft_model("t5gemma2", peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=3, lora_alpha=7, target_modules=ALL_LINEAR,
                                                     exclude_modules=OF_IMAGES["t5gemma2"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    subprocess.run([common.BUILD / "moesaic", "merge", "--model", folder, tmp_path / "adapter", tmp_path / "merged"],
                   check=True)
    merged, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True, attn_implementation="eager")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = common.sequences()
    with torch.no_grad():
        common.assert_close(common.reference_logits(merged.eval(), ids), common.reference_logits(wrapped, ids), "logits")


@pytest.mark.parametrize("variant", [v for v in LORA if v != "all-linear"])
def test_lora_variants_of_peft(variant, driver, models, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", **LORA[variant])
    check_peft_adapter_here("llama", config, driver, models, tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_ia3_of_peft(name, driver, models, tmp_path):
    # PEFT has no default targets for gemma3_text and umt5: its lists for gemma and t5.
    arguments = {"gemma3": dict(target_modules=["q_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
                 "t5gemma": dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
                 "t5gemma2": dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
                 "umt5": dict(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])}.get(name, IA3["default"])
    check_peft_adapter_here(name, peft.IA3Config(task_type=task_of(name), exclude_modules=OF_IMAGES.get(name), **arguments), driver, models, tmp_path)


@pytest.mark.parametrize("modules", ["cross", "inputs", "regex"])
def test_adapters_of_parts_of_an_encoder_decoder(modules, driver, models, tmp_path):
    """Only cross-attention; scales on what keys, values and outputs read; one expression over both halves."""
    config = {
        "cross": peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=3, lora_alpha=5,
                                 target_modules=["EncDecAttention.k", "EncDecAttention.v"]),
        "inputs": peft.IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=["k", "v", "o", "wi_1"],
                                 feedforward_modules=["k", "v", "o", "wi_1"]),
        "regex": peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, lora_alpha=3,
                                 target_modules=r"(encoder.block.1|decoder.block.[02]).*\.(q|v|wo)"),
    }[modules]
    check_peft_adapter_here("t5-gated", config, driver, models, tmp_path)


def test_published_lora_of_t5_large(driver, tmp_path):
    """A LoRA that somebody trained (rank 16, q and v), on the first block of each half of a base of t5-large's width."""
    published = common.published_t5()
    tensors = common.load_file(published / "adapter_model.safetensors")
    assert len(tensors) == 2 * 144 and sum(t.numel() for t in tensors.values()) == 4_718_592
    large = common.Family(transformers.T5Config, dict(feed_forward_proj="relu", d_model=1024, d_kv=64, num_heads=16,
                                                      num_layers=1, num_decoder_layers=1))
    base = common.make_model(large, tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(published / "adapter_config.json", adapter)
    save_file({k: v for k, v in tensors.items() if ".block.0." in k}, adapter / "adapter_model.safetensors")
    ids = common.sequences()
    plain = common.reference_logits(base, ids)
    wrapped = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()
    logits, _, gradients = common.reference_gradients(wrapped, ids, common.masks(ids))
    assert len(gradients) == 12 and (logits - plain).abs().max() > 0.01 * plain.abs().max()
    ours = driver.run(tmp_path / "out.safetensors", model=tmp_path / "base", adapter=adapter, mode="adapter",
                      sequences=ids, mask=common.masks(ids))
    common.assert_close(ours["logits"], logits, "logits")
    common.assert_gradients_close(common.split_gradients(ours), {file_name(n): g for n, g in gradients.items()})
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(common.DriverError, match=r"unexpected \(276\):\s*decoder.block.1.layer.0.SelfAttention.q.lora_A"):
        driver.run(tmp_path / "out.safetensors", model=tmp_path / "base", adapter=adapter, mode="adapter",
                   sequences=ids, mask=common.masks(ids))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("variant", [v for v in IA3 if v != "default"])
def test_ia3_variants_of_peft(name, variant, driver, models, tmp_path):
    check_peft_adapter_here(name, peft.IA3Config(task_type="CAUSAL_LM", **IA3[variant]), driver, models, tmp_path)


# Of our adapters on experts PEFT makes pairs of twice the rank for gate and up in one. It has no such rule for granite,
# and leaves the experts' pairs out where other modules have the same names (qwen2_moe's shared expert).
@pytest.mark.parametrize("name, method", [*((name, method) for name in ALL for method in ("lora", "ia3")),
                                          *((name, "lora") for name in ("mixtral", "qwen3_moe", "olmoe"))])
def test_our_adapter_in_peft(name, method, driver, models, tmp_path):
    _, folder = models(name)
    create = {"method": method, "preset": "all-linear", "rank": 3, "alpha": 6.0, "seed": 11}
    ids = common.sequences()
    ours = driver.run(tmp_path / "out.safetensors", model=folder, create=create, save_adapter=tmp_path / "adapter",
                      sequences=ids, mask=common.masks(ids))
    wrapped = peft.PeftModel.from_pretrained(common.make_model(name), tmp_path / "adapter")
    with torch.no_grad():
        theirs = common.reference_logits(wrapped, ids)
        base = common.reference_logits(models(name)[0], ids)
        exact = common.reference_logits(wrapped.double(), ids)
    assert (theirs - base).abs().max() > 0.05 * base.abs().max(), "the adapter has no effect"
    # A drawn adapter may make T5, which does not divide scores by sqrt(k), choose between keys: rounding then shows in
    # transformers' float32, too. Sums in another order may be three times as far from float64.
    rounding = (theirs - exact).abs().max() / exact.abs().max()
    common.assert_close(ours["logits"], exact.float(), "logits", relative=max(common.RELATIVE, 3 * rounding.item()))


def test_saved_again_is_the_same(driver, models, tmp_path):
    """PEFT -> here -> PEFT keeps every number."""
    _, folder = models("qwen2")
    wrapped = peft_model("qwen2", peft.LoraConfig(task_type="CAUSAL_LM", **LORA["patterns"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = common.sequences()
    driver.run(tmp_path / "out.safetensors", model=folder, adapter=tmp_path / "adapter",
               save_adapter=tmp_path / "again", sequences=ids, mask=common.masks(ids))
    first = common.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    again = common.load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert sorted(first) == sorted(again)
    assert all(torch.equal(first[k], again[k]) for k in first)
    reloaded = peft.PeftModel.from_pretrained(common.make_model("qwen2"), tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(common.reference_logits(reloaded, ids), common.reference_logits(wrapped, ids))


def test_scale_multiplies_the_effect(driver, models, tmp_path):
    _, folder = models("llama")
    wrapped = peft_model("llama", peft.LoraConfig(task_type="CAUSAL_LM", **LORA["all-linear"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    for module in wrapped.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scaling["default"] *= 0.25
    ids = common.sequences()
    ours = driver.run(tmp_path / "out.safetensors", model=folder, adapter=tmp_path / "adapter", scale=0.25,
                      sequences=ids, mask=common.masks(ids))
    with torch.no_grad():
        common.assert_close(ours["logits"], common.reference_logits(wrapped, ids), "logits")


@pytest.mark.parametrize("damage", ["renamed", "dropped", "added"])
def test_adapter_that_does_not_fit_is_refused(damage, driver, models, tmp_path):
    from safetensors.torch import save_file

    _, folder = models("llama")
    peft_model("llama", peft.LoraConfig(task_type="CAUSAL_LM", **LORA["all-linear"])).save_pretrained(tmp_path / "good")
    bad = shutil.copytree(tmp_path / "good", tmp_path / "bad")
    tensors = common.load_file(bad / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    other = key.replace("layers.1", "layers.7")
    if damage == "renamed":
        tensors[other] = tensors.pop(key)
    elif damage == "dropped":
        tensors.pop(key)
    else:
        tensors[other] = tensors[key].clone()
    save_file(tensors, bad / "adapter_model.safetensors")
    ids = common.sequences()
    with pytest.raises(common.DriverError) as error:
        driver.run(tmp_path / "out.safetensors", model=folder, adapter=bad, sequences=ids, mask=common.masks(ids))
    if damage != "added":
        assert "model.layers.1.mlp.up_proj.lora_B.weight" in str(error.value)
    if damage != "dropped":
        assert "model.layers.7.mlp.up_proj.lora_B.weight" in str(error.value)
