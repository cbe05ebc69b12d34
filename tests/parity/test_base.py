"""The frozen models: logits, loss and the gradient of every weight, against transformers."""

import json
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import save_file

import common


@pytest.mark.parametrize("name", common.FAMILIES)
def test_logits_and_loss(name, driver, models, tmp_path):
    model, folder = models(name)
    ids = common.sequences()
    mask = common.masks(ids)
    logits = common.reference_logits(model, ids)
    for normalization in ("tokens", "sequences"):
        ours = driver.run(tmp_path / "out.safetensors", model=folder, sequences=ids, mask=mask,
                          normalization=normalization)
        common.assert_close(ours["logits"], logits, "logits")
        common.assert_close(ours["loss"], common.loss_of(logits, ids, mask, normalization), f"{normalization} loss")


# What transformers 4 wrote; `layer_types` did not exist, so the windows must follow from older keys or defaults.
@pytest.mark.parametrize("name", [n for n in common.FAMILIES if n not in ("gemma3-softcap", "t5gemma2")])
def test_transformers_4_config(name, driver, models, tmp_path):
    model, folder = models(name)
    old = shutil.copytree(folder, tmp_path / "old")
    common.rewrite_as_transformers_4(old)
    ids = common.sequences()
    ours = driver.run(tmp_path / "out.safetensors", model=old, sequences=ids, mask=common.masks(ids))
    common.assert_close(ours["logits"], common.reference_logits(model, ids), "logits")


@pytest.mark.parametrize("name", common.FAMILIES)
def test_full_gradients(name, driver, models, tmp_path):
    _, folder = models(name)
    model = common.make_model(name).requires_grad_(True)
    ids = common.sequences()
    mask = common.masks(ids)
    _, loss, gradients = common.reference_gradients(model, ids, mask)
    ours = driver.run(tmp_path / "out.safetensors", model=folder, mode="full", sequences=ids, mask=mask)
    common.assert_close(ours["loss"], loss, "loss")
    common.assert_gradients_close(common.split_gradients(ours), gradients)


def test_sharded_checkpoint(driver, models, tmp_path):
    model, _ = models("llama")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    ids = common.sequences()
    ours = driver.run(tmp_path / "out.safetensors", model=tmp_path / "sharded", sequences=ids, mask=common.masks(ids))
    common.assert_close(ours["logits"], common.reference_logits(model, ids), "logits")


@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_pytorch_model_bin(name, driver, models, tmp_path):
    """torch.save's files, single and sharded, as models of before safetensors lie on the hub."""
    model, folder = models(name)
    ids = common.sequences()
    state = model.state_dict()
    names = sorted(state)
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    for copy in (single, sharded):
        copy.mkdir()
        shutil.copy(folder / "config.json", copy)
    torch.save(state, single / "pytorch_model.bin")
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        shard = f"pytorch_model-{i + 1:05}-of-00002.bin"
        torch.save({key: state[key] for key in part}, sharded / shard)
        index.update(dict.fromkeys(part, shard))
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    for copy in (single, sharded):
        ours = driver.run(tmp_path / "out.safetensors", model=copy, sequences=ids, mask=common.masks(ids))
        common.assert_close(ours["logits"], common.reference_logits(model, ids), "logits")
    index[names[0]] = "../single/pytorch_model.bin"
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(common.DriverError, match="expected a .bin file of the same folder"):
        driver.run(tmp_path / "out.safetensors", model=sharded, sequences=ids, mask=common.masks(ids))


# bfloat16 keeps 8 bits: one rounding is up to 0.2 % of a value, and three layers of some ten roundings each, in another
# order than transformers', add up to some percent of the largest logit. So the yardstick is transformers itself: our
# bfloat16 may be at most a fifth as far again from float32 as transformers' bfloat16 is, by root mean square: the largest
# of some thousand roundings is chance.
# Of sparse models one whose tokens have all experts: in half precision a router may choose another one.
@pytest.mark.parametrize("name", common.ARCHITECTURES + ["mixtral-all"] + common.SEQ2SEQ)
def test_bfloat16(name, driver, models, tmp_path):
    model, folder = models(name)
    ids = common.sequences()
    exact = common.reference_logits(model, ids)
    half = common.make_model(name).to(torch.bfloat16)
    theirs = common.reference_logits(half, ids).float()
    ours = driver.run(tmp_path / "out.safetensors", model=folder, dtype="bfloat16", sequences=ids,
                      mask=common.masks(ids))["logits"]
    error, their_error = ((half - exact).square().mean().sqrt() / exact.abs().max() for half in (ours, theirs))
    assert error > 0
    assert error < 1.2 * their_error, f"ours {error:.4f}, transformers {their_error:.4f}"


@pytest.fixture(scope="module")
def driver_16_bits():
    """As on a processor without AVX512: what meets int8 weights has 16 bits, however many rows there are."""
    running = common.Driver(ATEN_CPU_CAPABILITY="avx2")
    yield running
    running.close()


@pytest.mark.parametrize("name", common.ARCHITECTURES + common.SPARSE + common.SEQ2SEQ)
def test_int8(name, driver_16_bits, models, tmp_path):
    """Weight-only int8. Ten times the float tolerance: a weight between two int8 steps may round either way, and a
    token computed alone (through the cache) has its activations rounded to 16 bits."""
    model, folder = models(name)
    rounded = common.round_linears_to_int8(common.make_model(name))
    ids = common.sequences()
    with torch.no_grad():
        reference = common.reference_logits(rounded, ids)
        base = common.reference_logits(model, ids)
    assert (reference - base).abs().max() > 1e-3 * base.abs().max()
    for mode in ("logits", "cached"):
        ours = driver_16_bits.run(tmp_path / "out.safetensors", model=folder, quantize=True, mode=mode, sequences=ids,
                          mask=common.masks(ids), prompts=common.prompt_lengths(ids))
        common.assert_close(ours["logits"], reference, mode, relative=10 * common.RELATIVE)


# An activation between two steps may round either way, and takes the rows that see its own with it, so the yardstick is
# the distance to whole activations.
@pytest.mark.parametrize("name", common.ARCHITECTURES)
def test_int8_with_activations_in_8_bits(name, driver, models, tmp_path):
    if "avx512_vnni" not in pathlib.Path("/proc/cpuinfo").read_text() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor has no AVX512-VNNI; kernels_test has these products on any")
    _, folder = models(name)
    model = common.round_linears_to_int8(common.make_model(name))
    ids = common.sequences()
    assert sum(map(len, ids)) > 16  # fewer have 16 bits
    with torch.no_grad():
        whole = common.reference_logits(model, ids)
        reference = common.reference_logits(common.round_activations_to_int8(model), ids)
    ours = driver.run(tmp_path / "out.safetensors", model=folder, quantize=True, sequences=ids,
                      mask=common.masks(ids))["logits"]

    def distance(expected):
        return (ours - expected).square().mean().sqrt() / expected.abs().max()

    assert distance(whole) > 10 * common.RELATIVE
    assert distance(reference) < 0.5 * distance(whole)


# --- encoder-decoders ------------------------------------------------------------------------------------------------

def test_copies_of_the_embedding(driver, models, tmp_path):
    """Files of transformers 4 hold the embedding three or four times, and a bias that nothing reads."""
    model, folder = models("t5")
    old = shutil.copytree(folder, tmp_path / "old")
    tensors = common.load_file(old / "model.safetensors")
    shared = tensors["shared.weight"]
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = shared.clone()
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(8, 4)
    ids = common.sequences()
    reference = common.reference_logits(model, ids)

    def logits(tensors):
        save_file(tensors, old / "model.safetensors")
        return driver.run(tmp_path / "out.safetensors", model=old, sequences=ids, mask=common.masks(ids))["logits"]

    common.assert_close(logits(tensors), reference, "logits")
    del tensors["shared.weight"], tensors["lm_head.weight"], tensors["decoder.embed_tokens.weight"]
    common.assert_close(logits(tensors), reference, "logits")
    tensors["decoder.embed_tokens.weight"] = shared + 1
    with pytest.raises(common.DriverError, match="decoder.embed_tokens.weight: is another matrix than encoder.embed_"):
        logits(tensors)


def test_umt5_is_not_scaled_when_its_file_says_so(driver, models, tmp_path):
    """transformers 5 divides by sqrt(d) whatever the file says; umT5's own files say that nothing is tied."""
    model, folder = models("umt5")
    own = shutil.copytree(folder, tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    ids = common.sequences()
    rows = common.answer_rows(ids)
    ours = driver.run(tmp_path / "out.safetensors", model=own, sequences=ids, mask=common.masks(ids))["logits"]
    reference = common.reference_logits(model, ids)[rows] * model.config.d_model**0.5
    common.assert_close(ours[rows], reference, "logits")


def test_float16_is_refused(driver, models, tmp_path):
    _, folder = models("t5")
    with pytest.raises(common.DriverError, match="float16.*65504"):
        driver.run(tmp_path / "out.safetensors", model=folder, dtype="float16", sequences=[[3, 4]], mask=[[0, 1]])
