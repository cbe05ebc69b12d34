"""Every setting of PEFT's adapter_config.json does here what it does there, or is refused by name."""

import dataclasses
import json
import pathlib

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import common

TARGETS = ["q_proj", "v_proj", "down_proj"]
# Say who made an adapter or how it is used, not what it computes.
SILENT = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
          "inference_mode", "runtime_config"}
# A value away from the default, with what else PEFT wants beside it.
LORA = {
    "r": dict(r=5),
    "target_modules": dict(target_modules=r".*layers\.[01]\..*(k_proj|o_proj)"),
    "exclude_modules": dict(exclude_modules=["v_proj"]),
    "lora_alpha": dict(lora_alpha=3),
    "lora_dropout": dict(lora_dropout=0.3),
    "fan_in_fan_out": dict(fan_in_fan_out=True),
    "bias": dict(bias="all"),
    "use_rslora": dict(use_rslora=True),
    "modules_to_save": dict(modules_to_save=["lm_head"]),
    "init_lora_weights": dict(init_lora_weights="pissa"),
    "layers_to_transform": dict(layers_to_transform=[1]),
    "layers_pattern": dict(layers_pattern="layers", layers_to_transform=[0, 2]),
    "rank_pattern": dict(rank_pattern={"layers.1.*": 6, "q_proj": 3}),
    "alpha_pattern": dict(alpha_pattern={"layers.1.*": 9, "q_proj": 1}),
    "megatron_config": {"megatron_config": {"tensor_model_parallel_size": 2}},
    "megatron_core": dict(megatron_core="elsewhere.core"),
    "trainable_token_indices": dict(trainable_token_indices=[3, 5]),
    "loftq_config": {"loftq_config": {"loftq_bits": 4}},
    "eva_config": {"eva_config": {"rho": 2.0}},
    "corda_config": {"corda_config": {"corda_method": "ipm"}},
    "lora_ga_config": {"lora_ga_config": {"direction": "ArB2r"}},
    "use_dora": dict(use_dora=True),
    "velora_config": {"velora_config": {"num_groups": 2}},
    "alora_invocation_tokens": dict(alora_invocation_tokens=[3, 4]),
    "use_qalora": dict(use_qalora=True),
    "qalora_group_size": dict(qalora_group_size=8),
    "monteclora_config": {"monteclora_config": {"num_samples": 2}},
    "layer_replication": dict(layer_replication=[[0, 2], [1, 3]]),
    "lora_bias": dict(lora_bias=True),
    "target_parameters": dict(target_parameters=["mlp.down_proj.weight"]),
    "use_bdlora": {"use_bdlora": {"nblocks": 2}},
    "arrow_config": {"arrow_config": {"top_k": 2}},
    "kasa_config": {"kasa_config": {"beta": 1.0}},
    "ensure_weight_tying": dict(ensure_weight_tying=True, modules_to_save=["embed_tokens"]),
}
IA3 = {
    "target_modules": dict(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "exclude_modules": dict(exclude_modules=["v_proj"]),
    "feedforward_modules": dict(target_modules=r".*(v_proj|down_proj|o_proj)", feedforward_modules=r".*(down|o)_proj"),
    "fan_in_fan_out": dict(fan_in_fan_out=True),
    "modules_to_save": dict(modules_to_save=["lm_head"]),
    "init_ia3_weights": dict(init_ia3_weights=False),
}


def lora(**more):
    return peft.LoraConfig(task_type="CAUSAL_LM", **{**dict(r=2, lora_alpha=4, target_modules=TARGETS), **more})


def ia3(**more):
    return peft.IA3Config(task_type="CAUSAL_LM", **more)


def disturbed(name, config, seed=5):
    return disturb(peft.get_peft_model(common.make_model(name), config), seed)


def disturb(wrapped, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * (0.6 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.3))
    return wrapped.eval()


def logits_in_peft(name, folder, ids):
    reloaded = peft.PeftModel.from_pretrained(common.make_model(name), folder).eval()
    with torch.no_grad():
        return common.reference_logits(reloaded, ids)


def logits_here(driver, folder, adapter, ids, out):
    return driver.run(out, model=folder, adapter=adapter, sequences=ids, mask=common.masks(ids))["logits"]


def test_every_setting_has_a_value_to_try():
    for config, values in [(peft.LoraConfig, LORA), (peft.IA3Config, IA3)]:
        assert {f.name for f in dataclasses.fields(config)} - SILENT == set(values)


@pytest.mark.parametrize("method, setting", [("lora", s) for s in LORA] + [("ia3", s) for s in IA3])
def test_a_setting_counts_or_is_refused_by_name(method, setting, driver, models, tmp_path):
    make, values = {"lora": (lora, LORA), "ia3": (ia3, IA3)}[method]
    ids, folder = common.sequences(), models("llama")[1]
    try:
        disturbed("llama", make(**values[setting])).save_pretrained(tmp_path / "a")
        expected = logits_in_peft("llama", tmp_path / "a", ids)
    except Exception:  # what PEFT can't make of a model as small as ours
        disturbed("llama", make()).save_pretrained(tmp_path / "a")
        path = tmp_path / "a" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), setting: values[setting][setting]}))
        expected = None
    try:
        got = logits_here(driver, folder, tmp_path / "a", ids, tmp_path / "out.safetensors")
    except common.DriverError as error:
        assert setting in str(error)
        assert setting not in ("use_dora", "bias", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora",
                               "modules_to_save", "layers_to_transform", "rank_pattern", "alpha_pattern",
                               "feedforward_modules", "init_ia3_weights")
        return
    assert expected is not None, f"{setting} is neither refused nor anything PEFT knows"
    common.assert_close(got, expected, "logits")


@pytest.mark.parametrize("value", ["olora", "corda", "loftq", "lora_ga", "pissa_niter_4"])
def test_start_values_that_move_the_base_are_refused(value, driver, models, tmp_path):
    disturbed("llama", lora()).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": value}))
    with pytest.raises(common.DriverError, match="init_lora_weights.*path_initial_model_for_weight_conversion"):
        logits_here(driver, models("llama")[1], tmp_path / "a", common.sequences(), tmp_path / "out.safetensors")


@pytest.mark.parametrize("value", ["gaussian", "orthogonal", False])
def test_start_values_that_leave_the_base_alone_load(value, driver, models, tmp_path):
    ids = common.sequences()
    disturbed("llama", lora(init_lora_weights=value)).save_pretrained(tmp_path / "a")
    common.assert_close(logits_here(driver, models("llama")[1], tmp_path / "a", ids, tmp_path / "out.safetensors"),
                        logits_in_peft("llama", tmp_path / "a", ids), "logits")


def test_patterns_are_tried_in_the_files_order(driver, models, tmp_path):
    ids = common.sequences()
    disturbed("llama", lora(rank_pattern={"q_proj": 2})).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    results = []
    for pattern in [{"q_proj": 1, ".*q_proj": 9}, {".*q_proj": 9, "q_proj": 1}, {"v_proj": 3, "layers.1.*": 7}]:
        path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": pattern}))
        results.append(logits_here(driver, models("llama")[1], tmp_path / "a", ids, tmp_path / "out.safetensors"))
        common.assert_close(results[-1], logits_in_peft("llama", tmp_path / "a", ids), str(pattern))
    assert not torch.allclose(results[0], results[1])


@pytest.mark.parametrize("name", common.ARCHITECTURES)
@pytest.mark.parametrize("more", [dict(target_modules="all-linear"),
                                  dict(use_rslora=True, rank_pattern={"v_proj": 4}, layers_to_transform=[0, 2])],
                         ids=["all", "some"])
def test_dora(name, more, driver, models, tmp_path):
    ids, folder = common.sequences(), models(name)[1]
    disturbed(name, lora(use_dora=True, **more)).save_pretrained(tmp_path / "a")
    expected = logits_in_peft(name, tmp_path / "a", ids)
    common.assert_close(logits_here(driver, folder, tmp_path / "a", ids, tmp_path / "out.safetensors"), expected,
                        "logits", relative=1e-5)
    cached = driver.run(tmp_path / "out.safetensors", model=folder, adapter=tmp_path / "a", mode="cached", sequences=ids,
                        save_adapter=tmp_path / "again")
    common.assert_close(cached["logits"], expected, "cached logits")
    file, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "again"))
    assert file.keys() == again.keys() and all(torch.equal(file[name], again[name]) for name in file)
    common.assert_close(logits_in_peft(name, tmp_path / "again", ids), expected, "logits in PEFT", relative=1e-6)


def test_dora_is_refused_where_it_can_not_be(driver, models, tmp_path):
    ids, folder = common.sequences(), models("llama")[1]
    disturbed("llama", lora(use_dora=True)).save_pretrained(tmp_path / "a")
    for job, reason in [(dict(quantize=True), r"got int8 numbers[^\0]*--quantize"), (dict(scale=0.5), "got the scale 0.5")]:
        with pytest.raises(common.DriverError, match=reason):
            driver.run(tmp_path / "out.safetensors", model=folder, adapter=tmp_path / "a", sequences=ids,
                       mask=common.masks(ids), **job)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_"
    for missing in ("magnitude_vector", "A.weight"):
        save_file({k: v for k, v in tensors.items() if k != name + missing},
                  tmp_path / "a" / "adapter_model.safetensors")
        with pytest.raises(common.DriverError, match="layers.1.self_attn.v_proj.*lora_" + missing.split(".")[0]):
            logits_here(driver, folder, tmp_path / "a", ids, tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["llama", "llama-tied-mqa", "gemma", "gemma3"])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj", "embed_tokens", "lm_head"]],
                         ids=lambda targets: "-".join(targets))
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_pairs_of_embedding_and_head(name, targets, dora, driver, models, tmp_path):
    ids = common.sequences()
    disturbed(name, lora(target_modules=targets, use_dora=dora)).save_pretrained(tmp_path / "a")
    common.assert_close(logits_here(driver, models(name)[1], tmp_path / "a", ids, tmp_path / "out.safetensors"),
                        logits_in_peft(name, tmp_path / "a", ids), "logits", relative=1e-5)


@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "llama"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_trained(name, bias, driver, models, tmp_path):
    ids = common.sequences()
    disturbed(name, lora(bias=bias, target_modules=["q_proj", "down_proj"])).save_pretrained(tmp_path / "a")
    held = [k for k in load_file(tmp_path / "a" / "adapter_model.safetensors") if k.endswith("bias")]
    assert bool(held) == (name != "llama")
    common.assert_close(logits_here(driver, models(name)[1], tmp_path / "a", ids, tmp_path / "out.safetensors"),
                        logits_in_peft(name, tmp_path / "a", ids), "logits", relative=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-tied-mqa", "gemma3"])
@pytest.mark.parametrize("rows", [5, -4], ids=["more", "fewer"])
@pytest.mark.parametrize("saved, more", [(None, {}), (["embed_tokens", "lm_head"], {}), (["embed_tokens"], {}),
                                         (["embed_tokens"], dict(ensure_weight_tying=True))],
                         ids=["beside", "both", "embedding", "tied"])
def test_a_resized_vocabulary(name, rows, saved, more, driver, models, tmp_path):
    """As transformers and PEFT have it after resize_token_embeddings()."""
    tied = common.make_model(name).config.tie_word_embeddings
    if tied and saved and len(saved) == 2 or more and not tied:
        pytest.skip("no such adapter")
    size = common.TINY["vocab_size"] + rows

    def base():
        model = common.make_model(name)
        model.resize_token_embeddings(size)
        return model

    ids = common.sequences(vocab_size=size)
    wrapped = disturb(peft.get_peft_model(base(), lora(modules_to_save=saved, **more)))
    wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with torch.no_grad():
        expected = common.reference_logits(peft.PeftModel.from_pretrained(base(), tmp_path / "a").eval(), ids)
    got = logits_here(driver, models(name)[1], tmp_path / "a", ids, tmp_path / "out.safetensors")
    assert got.shape[1] == size
    common.assert_close(got, expected, "logits", relative=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-tied-mqa", "llama-biases", "gemma3"])
@pytest.mark.parametrize("saved, tying", [(["embed_tokens"], False), (["lm_head"], False),
                                          (["embed_tokens", "lm_head"], False), (["embed_tokens"], True),
                                          (["norm"], False), (["k_proj"], False), (["self_attn", "mlp"], False)])
def test_whole_weights_of_modules_to_save(name, saved, tying, driver, models, tmp_path):
    ids = common.sequences()
    tied = common.make_model(name).config.tie_word_embeddings
    if tying and not tied:
        pytest.skip("there is nothing tied")
    targets = ["lm_head"] if "mlp" in saved else TARGETS
    wrapped = disturbed(name, lora(modules_to_save=list(saved), ensure_weight_tying=tying, target_modules=targets))
    wrapped.save_pretrained(tmp_path / "a")
    expected = logits_in_peft(name, tmp_path / "a", ids)
    common.assert_close(logits_here(driver, models(name)[1], tmp_path / "a", ids, tmp_path / "out.safetensors"),
                        expected, "logits")


@pytest.mark.parametrize("name", ["llama", "llama-tied-mqa"])
def test_embeddings_saved_beside_an_adapter(name, driver, models, tmp_path):
    ids = common.sequences()
    wrapped = disturbed(name, lora())
    with torch.no_grad():
        weight = wrapped.get_input_embeddings().weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    common.assert_close(logits_here(driver, models(name)[1], tmp_path / "a", ids, tmp_path / "out.safetensors"),
                        logits_in_peft(name, tmp_path / "a", ids), "logits")


@pytest.mark.parametrize("spelling", ["model.language_model.", "language_model.model."])
def test_names_of_multi_modal_folders(spelling, driver, models, tmp_path):
    """An adapter as PEFT saves it of Gemma 3 with its vision part, before and since transformers 4.52."""
    ids = common.sequences()
    disturbed("gemma3", lora(rank_pattern={r"model\.layers\.1.*q_proj": 3})).save_pretrained(tmp_path / "a")
    expected = logits_in_peft("gemma3", tmp_path / "a", ids)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    tensors = {k.replace("base_model.model.model.", "base_model.model." + spelling): v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    path = pathlib.Path(tmp_path / "a" / "adapter_config.json")
    config = json.loads(path.read_text())
    config["target_modules"] = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    config["rank_pattern"] = {spelling.replace(".", r"\.") + r"layers\.1.*q_proj": 3}
    path.write_text(json.dumps(config))
    common.assert_close(logits_here(driver, models("gemma3")[1], tmp_path / "a", ids, tmp_path / "out.safetensors"),
                        expected, "logits")
