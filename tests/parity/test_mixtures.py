"""MoV and MoLoRA against the plain PyTorch form: logits, loss, and the gradient of every expert and router."""

import peft
import pytest
import torch

import common
from mixtures import Mixture

# Router options, each with the models that show it. qwen3 has a norm behind its keys, gemma3 two norms around each half.
ROUTERS = {
    "soft": dict(),
    "temperature": dict(temperature=0.6),
    "top1-mask": dict(top_k=1),
    "top2-mask": dict(top_k=2),
    "top2-renorm": dict(top_k=2, topk_mode="renorm"),
    "top2-residual": dict(top_k=2, topk_mode="residual"),
    "absolute": dict(logits="absolute", temperature=0.7),
    "absolute-top2-renorm": dict(logits="absolute", top_k=2, topk_mode="renorm"),
    "layer-input": dict(input="layer_input"),
    "ffn-product": dict(input="ffn_product"),
    "sentence": dict(input="sentence", sentence_dim=9),
    "across-heads": dict(head_wise=False),
    "across-heads-top2": dict(head_wise=False, top_k=2, topk_mode="residual"),
    "across-heads-layer-input": dict(head_wise=False, input="layer_input"),
    "sentence-top2-renorm": dict(input="sentence", sentence_dim=9, top_k=2, topk_mode="renorm"),
}


def check(name, mixture, driver, folder, tmp_path, base):
    ids = common.sequences()
    mask = common.masks(ids)
    sentence = None
    if mixture.mixing.input == "sentence":
        sentence = torch.randn(len(ids), mixture.mixing.sentence_dim, generator=torch.Generator().manual_seed(2))
    logits = mixture.logits(ids, sentence)
    loss = common.loss_of(logits, ids, mask, "sequences")
    loss.backward()
    with torch.no_grad():
        plain = common.reference_logits(base, ids)
    assert (logits - plain).abs().max() > 0.05 * plain.abs().max(), "the adapter has no effect"
    ours = driver.run(tmp_path / "out.safetensors", model=folder, adapter=mixture.save(tmp_path / "adapter"),
                      mode="adapter", sequences=ids, mask=mask, normalization="sequences",
                      sentence=None if sentence is None else sentence.tolist())
    common.assert_close(ours["logits"], logits.detach(), "logits")
    common.assert_close(ours["loss"], loss.detach(), "loss")
    common.assert_gradients_close(common.split_gradients(ours), mixture.gradients())


@pytest.mark.parametrize("name", common.ARCHITECTURES + common.SEQ2SEQ)
@pytest.mark.parametrize("method", ["mov", "molora"])
def test_every_family(name, method, driver, models, tmp_path):
    base, folder = models(name)
    check(name, Mixture(common.make_model(name), method), driver, folder, tmp_path, base)


@pytest.mark.parametrize("method, router", [(method, router) for router in ROUTERS for method in ("mov", "molora")
                                            if router != "soft" and (method == "mov" or "across" not in router)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "t5-gated"])
def test_routers(name, method, router, driver, models, tmp_path):
    base, folder = models(name)
    mixture = Mixture(common.make_model(name), method, experts=5, **ROUTERS[router])
    check(name, mixture, driver, folder, tmp_path, base)


def test_top_k_of_all_experts_is_soft(driver, models, tmp_path):
    base, folder = models("llama")
    for mode in ("mask", "renorm", "residual"):
        mixture = Mixture(common.make_model("llama"), "mov", experts=3, top_k=3, topk_mode=mode)
        soft = Mixture(common.make_model("llama"), "mov", experts=3)
        ids = common.sequences()
        ours = driver.run(tmp_path / "out.safetensors", model=folder, adapter=mixture.save(tmp_path / mode),
                          sequences=ids, mask=common.masks(ids))
        with torch.no_grad():
            common.assert_close(ours["logits"], soft.logits(ids), mode)


@pytest.mark.parametrize("targets", [["q_proj"], ["o_proj", "gate_proj"], ["down_proj"]])
@pytest.mark.parametrize("form", ["plain", "concat"])
def test_molora_targets(targets, form, driver, models, tmp_path):
    base, folder = models("llama-biases")
    mixture = Mixture(common.make_model("llama-biases"), "molora", targets=targets, rank=3, form=form)
    check("llama-biases", mixture, driver, folder, tmp_path, base)


@pytest.mark.parametrize("targets", [["k_proj"], ["q_proj", "v_proj"], ["down_proj"]])
def test_mov_targets(targets, driver, models, tmp_path):
    base, folder = models("qwen2")
    mixture = Mixture(common.make_model("qwen2"), "mov", targets=targets)
    check("qwen2", mixture, driver, folder, tmp_path, base)


@pytest.mark.parametrize("router", ["soft", "layer-input"])
def test_mov_on_other_inputs(router, driver, models, tmp_path):
    """Inputs of linears that share one (q, v; k is not scaled) and of one that stands alone (o)."""
    base, folder = models("llama-biases")
    targets = ["q_proj", "v_proj", "o_proj", "k_proj"]
    mixture = Mixture(common.make_model("llama-biases"), "mov", targets=targets, input_targets=targets[:3],
                      **ROUTERS[router])
    check("llama-biases", mixture, driver, folder, tmp_path, base)


@pytest.mark.parametrize("method", ["mov", "molora"])
def test_experts_by_layer(method, driver, models, tmp_path):
    """A layer with one expert has no router."""
    base, folder = models("llama")
    mixture = Mixture(common.make_model("llama"), method, experts=[4, 1, 2])
    assert len([n for n in mixture.parameters if "layers.1." in n and "router" in n]) == 0
    check("llama", mixture, driver, folder, tmp_path, base)


@pytest.mark.parametrize("name, router", [
    *(("llama", router) for router in ["soft", "temperature", "top2-mask", "top2-renorm", "layer-input", "sentence"]),
    *(("t5-gated", router) for router in ["soft", "layer-input", "sentence"])])
@pytest.mark.parametrize("method", ["mov", "molora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_router_losses_in_training(name, method, router, checkpointing, driver, models, tmp_path):
    """One step of the trainer over two micro-batches of unequal sequences, dealt the longest first to the one with the
    fewest tokens, their prompts not trained on: loss, balance and z-loss, and the gradient of every expert and router.
    Prompts count for the routers, padding does not exist."""
    _, folder = models(name)
    mixture = Mixture(common.make_model(name), method, experts=5, **ROUTERS[router])
    ids = common.sequences()
    mask = common.masks(ids)
    sentence = None
    if router == "sentence":
        sentence = torch.randn(len(ids), mixture.mixing.sentence_dim, generator=torch.Generator().manual_seed(2))
    balance_coef, z_coef, micro_batch = 0.7, 0.3, 2
    tokens = sum(map(len, ids))
    dealt = [[] for _ in range(-(-len(ids) // micro_batch))]
    for i in sorted(range(len(ids)), key=lambda i: -len(ids[i])):
        min(dealt, key=lambda part: sum(len(ids[j]) for j in part)).append(i)
    logits, auxiliary = [None] * len(ids), 0
    for part in map(sorted, dealt):
        rows = mixture.logits([ids[i] for i in part], None if sentence is None else sentence[part])
        for i, row in zip(part, rows.split([len(ids[i]) for i in part])):
            logits[i] = row
        balance, z = mixture.mixing.losses()
        auxiliary = auxiliary + sum(len(ids[i]) for i in part) / tokens * (balance_coef * balance + z_coef * z)
    loss = common.loss_of(torch.cat(logits), ids, mask)
    (loss + auxiliary).backward()
    ours = driver.run(tmp_path / "out.safetensors", model=folder, adapter=mixture.save(tmp_path / "adapter"),
                      mode="step", sequences=ids, mask=mask, micro_batch=micro_batch,
                      moe_aux_loss_coef=balance_coef, router_z_loss_coef=z_coef, gradient_checkpointing=checkpointing,
                      sentence=None if sentence is None else sentence.tolist())
    assert auxiliary.item() > 0.5
    common.assert_close(ours["loss"], loss.detach(), "loss")
    common.assert_close(ours["aux_loss"], auxiliary.detach(), "auxiliary loss")
    common.assert_gradients_close(common.split_gradients(ours), mixture.gradients())


@pytest.mark.parametrize("k_site", ["output", "post_qk_norm"])
@pytest.mark.parametrize("router", ["soft", "layer-input"])
def test_k_site(k_site, router, driver, models, tmp_path):
    base, folder = models("qwen3")
    mixture = Mixture(common.make_model("qwen3"), "mov", k_site=k_site, **ROUTERS[router])
    check("qwen3", mixture, driver, folder, tmp_path, base)


def check_one_expert(mixture, wrapped, names, driver, folder, tmp_path):
    """The mixture with one expert gives what the PEFT model `wrapped` gives. names: its parameters -> the mixture's."""
    ids = common.sequences()
    mask = common.masks(ids)
    logits, loss, gradients = common.reference_gradients(wrapped.eval(), ids, mask)
    ours = driver.run(tmp_path / "out.safetensors", model=folder, adapter=mixture.save(tmp_path / "adapter"),
                      mode="adapter", sequences=ids, mask=mask)
    common.assert_close(ours["logits"], logits, "logits")
    common.assert_close(ours["loss"], loss, "loss")
    common.assert_gradients_close({k: v.flatten() for k, v in common.split_gradients(ours).items()},
                                  {names[n]: g.flatten() for n, g in gradients.items()})


@pytest.mark.parametrize("name", ["llama", "t5-gated", "t5"])
def test_one_expert_mov_is_ia3(name, driver, models, tmp_path):
    """The same numbers as PEFT's (IA)^3 with the same vectors; gradients too."""
    _, folder = models(name)
    mixture = Mixture(common.make_model(name), "mov", experts=1)
    wrapped = peft.get_peft_model(common.make_model(name), peft.IA3Config())
    names = {n: n.removeprefix("base_model.model.").replace(".ia3_l.default", ".mov.weight")
             for n, p in wrapped.named_parameters() if p.requires_grad}
    assert sorted(names.values()) == sorted(mixture.parameters)
    with torch.no_grad():
        for theirs, ours in names.items():
            wrapped.get_parameter(theirs).copy_(mixture.parameters[ours].view(wrapped.get_parameter(theirs).shape))
    check_one_expert(mixture, wrapped, names, driver, folder, tmp_path)


@pytest.mark.parametrize("name, alpha", [("llama", 7), ("t5-gated", 2)])
def test_one_expert_molora_is_lora(name, alpha, driver, models, tmp_path):
    _, folder = models(name)
    mixture = Mixture(common.make_model(name), "molora", experts=1, rank=3, alpha=alpha)
    wrapped = peft.get_peft_model(common.make_model(name), peft.LoraConfig(
        r=3, lora_alpha=alpha, target_modules=mixture.settings.targets))
    names = {n: n.removeprefix("base_model.model.").replace(".default", "")
             for n, p in wrapped.named_parameters() if p.requires_grad}
    assert sorted(names.values()) == sorted(mixture.parameters)
    with torch.no_grad():
        for theirs, ours in names.items():
            wrapped.get_parameter(theirs).copy_(mixture.parameters[ours][0])
    check_one_expert(mixture, wrapped, names, driver, folder, tmp_path)


@pytest.mark.parametrize("name", ["llama", "t5-gated"])
@pytest.mark.parametrize("method", ["mov", "molora"])
def test_start_state_is_the_base(method, name, driver, models, tmp_path):
    """A new mixture changes nothing, and its routers have no gradient to speak of: all experts are alike."""
    base, folder = models(name)
    ids = common.sequences()
    ours = driver.run(tmp_path / "out.safetensors", model=folder, mode="adapter", sequences=ids,
                      mask=common.masks(ids), create={"method": method, "experts": 4, "seed": 3, "perturb": False})
    common.assert_close(ours["logits"], common.reference_logits(base, ids), "logits")
    gradients = common.split_gradients(ours)
    experts = max(g.abs().max() for n, g in gradients.items() if ".router." not in n)
    routers = max(g.abs().max() for n, g in gradients.items() if ".router." in n)
    assert experts > 1e-3
    assert routers <= 1e-5 * experts
