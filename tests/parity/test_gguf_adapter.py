"""LoRAs written for llama.cpp: what it would add to each of its weights is what PEFT adds to its own."""

import subprocess

import gguf
import peft
import pytest
import torch

import common
import test_formats
import test_peft

RANK, ALPHA = 3, 7


def export(*arguments):
    return subprocess.run([common.BUILD / "moesaic", "export", *map(str, arguments), "--format", "gguf"],
                          capture_output=True, text=True)


def deltas(path):
    """{llama.cpp's weight: alpha / r B A}, as llama.cpp multiplies them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    parts = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    result = {}
    for name in [name.removesuffix(".lora_a") for name in parts if name.endswith(".lora_a")]:
        a, b = parts.pop(f"{name}.lora_a"), parts.pop(f"{name}.lora_b")
        alpha = fields["adapter.lora.alpha"]
        result[name] = (alpha / b.shape[-1] if alpha else 1.0) * b @ a  # llama.cpp takes an alpha of 0 for none given
    assert not parts
    return fields["general.architecture"], result


@pytest.mark.parametrize("settings", [dict(), dict(use_rslora=True),
                                      dict(rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 2}), dict(lora_alpha=0)],
                         ids=["plain", "rslora", "patterns", "no-effect"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_linears(name, settings, models, tmp_path):
    model, folder = models(name)
    wrapped = test_peft.peft_model(name, peft.LoraConfig(**{
        "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": test_peft.ALL_LINEAR, **settings}))
    wrapped.save_pretrained(tmp_path / "adapter")
    done = export("--model", folder, tmp_path / "adapter", tmp_path / "adapter.gguf")
    assert done.returncode == 0, done.stderr
    architecture, ours = deltas(tmp_path / "adapter.gguf")
    assert architecture == name
    merged = wrapped.merge_and_unload().state_dict()
    config, heads = model.config, {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == name),
                                     config.num_hidden_layers)
    adapted = {key: weight for key, weight in model.state_dict().items() if key.split(".")[-2] in test_peft.ALL_LINEAR
               and key.endswith(".weight")}
    assert len(ours) == len(adapted)
    for key, before in adapted.items():
        delta = merged[key] - before
        if name == "llama" and key.split(".")[-2] in heads:
            delta = torch.from_numpy(test_formats.interleave(delta.numpy(), heads[key.split(".")[-2]]))
        common.assert_close(ours[names.get_name(key, try_suffixes=(".weight",))], delta, key, 1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_stacks_of_experts(name, models, tmp_path):
    model, folder = models(name)
    wrapped = test_peft.peft_model(name, peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=["o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    done = export("--model", folder, tmp_path / "adapter", tmp_path / "adapter.gguf")
    assert done.returncode == 0, done.stderr
    architecture, ours = deltas(tmp_path / "adapter.gguf")
    assert architecture == {"mixtral": "llama", "qwen3_moe": "qwen3moe"}[name]
    before, behind = model.state_dict(), wrapped.merge_and_unload().state_dict()
    expected = {}
    for key in before:
        delta = behind[key] - before[key]
        for gguf_name, part in (test_formats.expert_tensors(key, delta, "apart") or {}).items():
            if "_exps" in gguf_name:
                expected[gguf_name] = part
        if ".o_proj." in key:
            expected[key.replace("model.layers", "blk").replace("self_attn.o_proj", "attn_output")] = delta
    assert ours.keys() == expected.keys()
    for key, delta in expected.items():
        common.assert_close(ours[key], delta, key, 1e-5)


def test_a_mixture_of_one(driver, models, tmp_path):
    """Its tensors have an axis of experts in our files."""
    _, folder = models("qwen2")
    ids = common.sequences()
    driver.run(tmp_path / "out.safetensors", model=folder, save_adapter=tmp_path / "adapter", sequences=ids,
               create={"method": "molora", "experts": 1, "rank": RANK, "alpha": ALPHA}, mask=common.masks(ids))
    done = export("--model", folder, tmp_path / "adapter", tmp_path / "adapter.gguf")
    assert done.returncode == 0, done.stderr
    tensors = common.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.model.layers.1.mlp.up_proj.lora_{which}.weight"] for which in "AB")
    assert a.shape[0] == b.shape[0] == 1
    common.assert_close(deltas(tmp_path / "adapter.gguf")[1]["blk.1.ffn_up.weight"], ALPHA / RANK * b[0] @ a[0], "delta",
                        1e-5)


def test_what_llama_cpp_has_not_is_refused(driver, models, tmp_path):
    _, folder = models("llama")
    ids = common.sequences()
    for name, create, message in [("mixture", {"method": "molora", "experts": 3}, "molora with 3 experts"),
                                  ("vectors", {"method": "ia3"}, "ia3 with 1 experts")]:
        driver.run(tmp_path / "out.safetensors", model=folder, create=create, save_adapter=tmp_path / name, sequences=ids,
                   mask=common.masks(ids))
        done = export("--model", folder, tmp_path / name, tmp_path / "adapter.gguf")
        assert done.returncode == 2 and message in done.stderr, done.stderr
    dora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(common.make_model("llama"), dora).save_pretrained(tmp_path / "dora")
    done = export("--model", folder, tmp_path / "dora", tmp_path / "adapter.gguf")
    assert done.returncode == 2 and "use_dora" in done.stderr, done.stderr
    done = export("--model", folder, tmp_path / "adapter.gguf")
    assert done.returncode == 2 and "expected an adapter" in done.stderr, done.stderr
    assert not (tmp_path / "adapter.gguf").exists()
