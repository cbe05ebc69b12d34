"""`moesaic mix` against PEFT: the uniform mix is its add_weighted_adapter, the arrow router its create_arrow_model."""

import subprocess

import peft
import pytest
import torch

import common

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARTS = {
    "alike": [dict(r=3, lora_alpha=7, target_modules=ALL_LINEAR)] * 3,
    "ranks-and-alphas": [dict(r=2, lora_alpha=4, target_modules=ALL_LINEAR),
                         dict(r=5, lora_alpha=3, use_rslora=True, target_modules=ALL_LINEAR),
                         dict(r=3, lora_alpha=6, target_modules=ALL_LINEAR, rank_pattern={"down_proj": 7},
                              alpha_pattern={"v_proj": 1})],
    "targets": [dict(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]),
                dict(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
                dict(r=3, lora_alpha=8, target_modules=["gate_proj", "q_proj"])],
}


def save_parts(name, configs, folder):
    """LoRAs far from their start, one dominant direction each, so that few steps of a power iteration find it."""
    for i, arguments in enumerate(configs):
        wrapped = peft.get_peft_model(common.make_model(name), peft.LoraConfig(task_type="CAUSAL_LM", **arguments))
        generator = torch.Generator().manual_seed(20 + i)
        with torch.no_grad():
            for parameter_name, p in wrapped.named_parameters():
                if not p.requires_grad:
                    continue
                p.copy_(0.6 * torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
                if "lora_A" in parameter_name:
                    p[1:] *= 0.3
                else:
                    p[:, 1:] *= 0.3
        wrapped.save_pretrained(folder / f"part_{i}")
    return [folder / f"part_{i}" for i in range(len(configs))]


def mix(parts, out, *flags):
    done = subprocess.run([common.BUILD / "moesaic", "mix", *parts, "-o", out, *map(str, flags)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def loaded(name, parts):
    wrapped = peft.PeftModel.from_pretrained(common.make_model(name), parts[0], adapter_name="part_0")
    for i, part in enumerate(parts[1:], 1):
        wrapped.load_adapter(part, adapter_name=f"part_{i}")
    return wrapped


def ours(folder, adapter, driver, tmp_path):
    ids = common.sequences()
    return driver.run(tmp_path / "out.safetensors", model=folder, adapter=adapter, sequences=ids,
                      mask=common.masks(ids))["logits"]


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_uniform(name, kind, driver, models, tmp_path):
    base, folder = models(name)
    parts = save_parts(name, PARTS[kind], tmp_path)
    wrapped = loaded(name, parts)
    names = [f"part_{i}" for i in range(len(parts))]
    wrapped.add_weighted_adapter(names, [1 / len(parts)] * len(parts), "mean", combination_type="cat")
    wrapped.set_adapter("mean")
    ids = common.sequences()
    with torch.no_grad():
        reference = common.reference_logits(wrapped.eval(), ids)
        plain = common.reference_logits(base, ids)
    assert (reference - plain).abs().max() > 0.05 * plain.abs().max(), "the mix has no effect"
    got = ours(folder, mix(parts, tmp_path / "mix"), driver, tmp_path)
    common.assert_close(got, reference, "logits")


@pytest.mark.parametrize("top_k, temperature", [(3, 1.0), (2, 1.0), (1, 1.0), (2, 0.3)])
def test_arrow(top_k, temperature, driver, models, tmp_path):
    base, folder = models("llama")
    parts = save_parts("llama", PARTS["alike"], tmp_path)
    config = peft.ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=3)
    wrapped = peft.create_arrow_model(common.make_model("llama"), [str(part) for part in parts], config).eval()
    for module in wrapped.modules():  # its estimates of the directions, converged
        if type(module).__name__ == "ArrowLoraLinearLayer":
            estimate = module.top_right_singular_vec_from_BA
            module.top_right_singular_vec_from_BA = lambda a, b, estimate=estimate: estimate(a, b, iters=200)
    ids = common.sequences()
    with torch.no_grad():
        reference = common.reference_logits(wrapped, ids)
        plain = common.reference_logits(base, ids)
    assert (reference - plain).abs().max() > 0.05 * plain.abs().max(), "the mix has no effect"
    out = mix(parts, tmp_path / "mix", "--router", "arrow", "--top_k", top_k, "--temperature", temperature)
    common.assert_close(ours(folder, out, driver, tmp_path), reference, "logits")
    uniform = ours(folder, mix(parts, tmp_path / "uniform"), driver, tmp_path)
    assert (uniform - reference).abs().max() > 0.01 * reference.abs().max(), "the router makes no difference"
