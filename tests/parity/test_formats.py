"""Model folders and GGUF files, read and written by Moesaic, against transformers and the gguf package."""

import functools
import json
import re
import subprocess
import unicodedata

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

import common

FAMILIES = {
    **{name: common.FAMILIES[name] for name in ["llama", "llama-biases", "llama-tied-mqa", "llama-rope-linear", "qwen3",
                                                "gemma", "gemma2", "gemma3"]},
    # The GGUF of a qwen2 holds no head size apart from width / heads.
    "qwen2": common.Family(transformers.Qwen2Config, dict(hidden_size=40, head_dim=10, tie_word_embeddings=True)),
    **{name: common.FAMILIES[name] for name in ["mixtral", "qwen3_moe", "granitemoe", "granitemoeshared"]},
    # A GGUF of these knows neither dense layers nor limits of queries, keys and values.
    "qwen2_moe": common.Family(transformers.Qwen2MoeConfig, dict(
        hidden_size=40, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=18,
        shared_expert_intermediate_size=28)),
    "olmoe": common.Family(transformers.OlmoeConfig, dict(hidden_size=40, num_experts=7, num_experts_per_tok=3)),
}
ARCHITECTURES = {"gemma3_text": "gemma3", "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
                 "granitemoeshared": "granitemoe"}  # by model_type, where they differ

TEXTS = [
    "Hello world! It's 3.14, or 1234567 (roughly).", "def f(x):\n\treturn x ** 2  # ok\n\n\n", "I'm, you're, they'LL",
    "naïve café, Straße, ½ ² ٣٤", "漢字かな 한국어 русский עברית", "😀👍🏽 family 👨‍👩‍👧", "  leading   and trailing   ",
    "tab\tnewline\r\ncrlf\r\n\r\n", "\u00a0nbsp\u2003em\u200bzero", "a" * 200, "<s>x</s> <|end|>y", "", " ", "\n", "x  1",
    "ABCdefGHI aBC", "snake_case->arrow[0]{1}", "http://a.b/c?d=e&f=%20",
]


def convert(source, output, *arguments):
    driver = common.BUILD / "tests" / "parity" / "checkpoint_driver"
    subprocess.run([driver, source, output, *map(str, arguments)], check=True)
    return output


def metadata_of(writer, config, arch):
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_uint32("gemma3.attention.sliding_window_pattern", 6)
        writer.add_float32("gemma3.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    if arch == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch != "qwen2":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if hasattr(config, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        for key in ("shared_expert_intermediate_size", "shared_intermediate_size"):
            if hasattr(config, key):
                writer.add_expert_shared_feed_forward_length(getattr(config, key))
    if arch == "granitemoe":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def interleave(weight, heads):
    """llama.cpp's order of a head's rows: the pairs that rotate together stand side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def expert_tensors(name, tensor, experts):
    """llama.cpp's names and tensors of one of a sparse layer; None for any other. `experts`: how they lie in the file:
    apart (gate and up are two), together (one), or single (each expert's by itself, as before there were stacks)."""
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    part = part.removeprefix("mlp.").removeprefix("block_sparse_moe.").removesuffix(".weight")
    if part in ("gate", "router") and tensor.dim() == 2:
        return {f"blk.{layer}.ffn_gate_inp.weight": tensor}
    if part == "shared_expert_gate":
        return {f"blk.{layer}.ffn_gate_inp_shexp.weight": tensor[0]}
    shared = {"shared_mlp.input_linear": ("gate", "up"), "shared_mlp.output_linear": ("down",)}.get(part)
    if part.startswith("shared_expert."):
        shared = (part.removeprefix("shared_expert.").removesuffix("_proj"),)
    if shared:
        return {f"blk.{layer}.ffn_{which}_shexp.weight": t for which, t in zip(shared, tensor.chunk(len(shared)))}
    if part not in ("experts.gate_up_proj", "experts.down_proj"):
        return None
    if part == "experts.gate_up_proj" and experts == "together":
        return {f"blk.{layer}.ffn_gate_up_exps.weight": tensor}
    which = ("gate", "up") if part == "experts.gate_up_proj" else ("down",)
    stacks = dict(zip(which, tensor.chunk(len(which), 1)))
    if experts != "single":
        return {f"blk.{layer}.ffn_{which}_exps.weight": t for which, t in stacks.items()}
    return {f"blk.{layer}.ffn_{which}.{e}.weight": t[e] for which, t in stacks.items() for e in range(len(t))}


def write_gguf(path, model=None, arch="llama", tokenizer=None, attn_factor=None, stored={}, experts="apart"):
    """What llama.cpp's converter writes for a tiny model, in float32; without one, any model around the tokenizer.

    `stored` has blocks and their type for tensors that are quantised; `experts`: see expert_tensors.
    """
    writer = gguf.GGUFWriter(path, arch)
    if tokenizer:
        tokenizer(writer)
    if model is None:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**common.TINY, "hidden_size": 40}))
        if arch == "gemma3":
            rope = model.config.rope_parameters
            model.config.rope_parameters = {"full_attention": rope, "sliding_attention": rope}
            model.config.sliding_window = 8
    config = model.config
    metadata_of(writer, config, arch)
    if attn_factor:
        writer.add_rope_scaling_attn_factors(attn_factor)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch),
                                     config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        of_experts = expert_tensors(name, tensor, experts)
        for gguf_name, part in (of_experts or {}).items():
            writer.add_tensor(gguf_name, np.ascontiguousarray(part.numpy()))
        if of_experts:
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name in stored:
            writer.add_tensor(gguf_name, stored[name][0], raw_dtype=stored[name][1])
            continue
        data = tensor.numpy()
        if arch in ("llama", "granitemoe") and ".q_proj." in name:
            data = interleave(data, config.num_attention_heads)
        elif arch in ("llama", "granitemoe") and ".k_proj." in name:
            data = interleave(data, config.num_key_value_heads)
        elif arch.startswith("gemma") and name.endswith("norm.weight"):
            data = data + 1
        writer.add_tensor(gguf_name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_model(folder, reference, tolerance=0.0):
    """Every tensor equals the reference's and so do the logits, whose config came through the folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager",
                                                              experts_implementation="eager").eval()
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=tolerance), name
    with torch.no_grad():
        ids = common.sequences()
        # Equal weights at other addresses: the products are summed in another order.
        common.assert_close(common.reference_logits(model, ids), common.reference_logits(reference, ids), "logits", 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf(family, tmp_path):
    config = FAMILIES[family].config()
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    if arch == "gemma3":  # every sixth layer is global in a GGUF
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    if arch in ("gemma2", "gemma3"):  # a GGUF's softmax scale is the head size's
        config.query_pre_attn_scalar = config.head_dim
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager",
                                                          experts_implementation="eager").eval()
    common.randomise(model)
    path = write_gguf(tmp_path / "model.gguf", model, arch)
    # Adding 1 to gemma's norms and taking it off again rounds once: 2^-24 at values below 2, twice that below 4.
    tolerance = 2.0 ** -22 if arch.startswith("gemma") else 0.0
    assert_same_model(convert(path, tmp_path / "folder"), model, tolerance)
    if arch not in ("llama", "gemma2", "gemma3") or family == "mixtral":
        return
    # What the converter changed here is undone by transformers' reader too, so it is what llama.cpp's would have written.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    for name, tensor in theirs.state_dict().items():
        assert torch.allclose(tensor, model.state_dict()[name], rtol=0, atol=tolerance), name


@pytest.mark.parametrize("experts", ["together", "single"])
def test_older_and_newer_gguf_of_experts(experts, tmp_path):
    model = common.make_model("mixtral")
    path = write_gguf(tmp_path / "model.gguf", model, "llama", experts=experts)
    assert_same_model(convert(path, tmp_path / "folder"), model)


@pytest.mark.parametrize("family", common.SPARSE)
def test_experts_in_one_tensor(family, driver, tmp_path):
    """The names that transformers 5 has in memory, which mergekit writes; and back to those that everything reads."""
    model = common.make_model(family)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(name.endswith("experts.down_proj") for name in load_file(tmp_path / "fused" / "model.safetensors"))
    ids = common.sequences()
    ours = driver.run(tmp_path / "out.safetensors", model=tmp_path / "fused", sequences=ids, mask=common.masks(ids))
    common.assert_close(ours["logits"], common.reference_logits(model, ids), "logits")
    model.save_pretrained(tmp_path / "apart")
    theirs = load_file(tmp_path / "apart" / "model.safetensors")
    written = load_file(convert(tmp_path / "fused", tmp_path / "folder") / "model.safetensors")
    assert written.keys() == theirs.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in theirs.items())
    assert_same_model(tmp_path / "folder", model)


@pytest.mark.parametrize("kind", ["IQ4_NL", "IQ4_XS"])
def test_quantised_tensors(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**common.TINY, "hidden_size": 40,
                                                                      "intermediate_size": 256}))
    blocks = np.random.default_rng(7).integers(0, 256, (40, 256 // elements * size), dtype=np.uint8)
    for d in range(0, blocks.shape[1], size):
        blocks[:, d:d + 2] = np.random.default_rng(d).normal(0, 0.3, (40, 1)).astype(np.float16).view(np.uint8)
    path = write_gguf(tmp_path / "model.gguf", model, stored={"model.layers.1.mlp.down_proj.weight": (blocks, kind)})
    tensors = load_file(convert(path, tmp_path / "folder") / "model.safetensors")
    assert np.array_equal(tensors["model.layers.1.mlp.down_proj.weight"].numpy(), gguf.quants.dequantize(blocks, kind))


@pytest.mark.parametrize("family", ["llama", "llama-rope-linear", "llama-rope-yarn", "gemma3"])
def test_attn_factor_multiplies_whatever_the_scaling(family, tmp_path, driver):
    """cos and sin of queries and keys times a: the same as queries and keys times a."""
    config = common.FAMILIES[family].config()
    arch = config.model_type.removesuffix("_text")
    if arch == "gemma3":
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
        config.query_pre_attn_scalar = config.head_dim
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    common.randomise(model)
    path = write_gguf(tmp_path / "model.gguf", model, arch, attn_factor=0.7)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            if arch != "gemma3":
                projection.weight.data *= 0.7
        if arch == "gemma3":  # behind their norms, whose weight is 1 + w
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.data = 0.7 * (1 + norm.weight.data) - 1
    ids = common.sequences()
    ours = driver.run(tmp_path / "out.safetensors", model=path, sequences=ids, mask=common.masks(ids))["logits"]
    with torch.no_grad():
        common.assert_close(ours, common.reference_logits(model, ids), "logits", 2e-5)


@pytest.mark.parametrize("family", ["llama-rope-llama3", "qwen3", "gemma3", "qwen3_moe", "granitemoeshared"])
@pytest.mark.parametrize("old", [False, True], ids=["transformers5", "transformers4"])
def test_folder_with_shards(family, old, tmp_path):
    model = common.make_model(family, tmp_path / "in")
    if old:
        common.rewrite_as_transformers_4(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", 20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert_same_model(tmp_path / "out", model)
    common.rewrite_as_transformers_4(tmp_path / "out")  # our extra keys alone mean the same
    assert_same_model(tmp_path / "out", model)


def test_text_part_of_a_multimodal_model(tmp_path):
    text = {**common.TINY, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 5, "vocab_size": 140}
    vision = dict(hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    whole = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=136,
                                  eoi_token_index=137, image_token_index=138)).eval()
    common.randomise(whole)
    whole.save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    model = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "out").eval()
    theirs = {name.replace("model.language_model.", "model."): tensor for name, tensor in whole.state_dict().items()
              if "vision" not in name and "multi_modal" not in name}
    assert model.state_dict().keys() == theirs.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@functools.cache
def training_text():
    files = [*common.ROOT.glob("*.md"), *(common.ROOT / "moesaic" / "formats").glob("*.cpp")]
    texts = [path.read_text() for path in files]
    # transformers takes <unk>, <pad> and <mask> in a text for the tokens of that name, a GGUF file's reader doesn't.
    return [text for text in texts if not re.search("<(unk|mask|pad)>", text)] + TEXTS


@functools.cache
def byte_level_vocabulary():
    """(tokens, merges) of a small byte-level BPE whose words may hold spaces and digits."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.train_from_iterator(training_text(), tokenizers.trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe = json.loads(model.to_str())["model"]
    return sorted(bpe["vocab"], key=bpe["vocab"].get), [" ".join(merge) for merge in bpe["merges"]]


def byte_level(pre, architecture="llama", bos=None):
    tokens, merges = byte_level_vocabulary()
    tokens = tokens + ["<|end|>", "<think>"]

    def write(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([1] * (len(tokens) - 2) + [3, 4])
        writer.add_token_merges(merges)
        writer.add_eos_token_id(len(tokens) - 2)
        writer.add_bos_token_id(len(tokens) - 2)
        writer.add_add_bos_token(bool(bos))
    return write


def sentencepiece(writer):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    model.train_from_iterator(training_text(), tokenizers.trainers.BpeTrainer(vocab_size=700, limit_alphabet=150,
                                                                              show_progress=False))
    vocab = model.get_vocab()
    pieces = sorted(vocab, key=vocab.get)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "▁▁", "▁▁▁▁"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(pieces) + 2))
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(pieces) + 2)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def tokenizers_of(tmp_path, write, arch="llama"):
    """(ours, transformers') of a GGUF with this tokenizer."""
    path = write_gguf(tmp_path / "model.gguf", arch=arch, tokenizer=write)
    convert(path, tmp_path / "folder")
    return (tokenizers.Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json")),
            transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name))


def assert_same_ids(ours, theirs, texts=TEXTS):
    for text in texts + training_text():
        encoded = ours.encode(text)
        assert encoded.ids == theirs(text).input_ids, repr(text[:60])
        assert ours.decode(encoded.ids, skip_special_tokens=False) == theirs.decode(encoded.ids), repr(text[:60])


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "tekken", "qwen2", "deepseek-r1-qwen"])
def test_byte_level_tokenizer(pre, tmp_path):
    ours, theirs = tokenizers_of(tmp_path, byte_level(pre))
    # Qwen's own tokenizer.json normalises to NFC, which transformers' reading of a GGUF leaves out.
    assert_same_ids(ours, theirs, [unicodedata.normalize("NFC", text) for text in TEXTS])
    if pre == "qwen2":
        assert ours.encode("e\u0301").ids == ours.encode("\u00e9").ids


@pytest.mark.parametrize("pre", ["smollm"])
def test_digits_are_cut_first(pre, tmp_path):
    """transformers reads this kind of GGUF without its digit splitter; the model's own tokenizer.json has it."""
    ours, theirs = tokenizers_of(tmp_path, byte_level(pre))
    theirs.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert_same_ids(ours, theirs)
    assert [ours.decode([i]) for i in ours.encode("a  12").ids] == ["a", "  ", "1", "2"]


def test_bos_is_added_when_the_file_says_so(tmp_path):
    ours, theirs = tokenizers_of(tmp_path, byte_level("gpt-2", bos=True))
    assert_same_ids(ours, theirs)
    assert ours.encode("x").tokens[0] == "<|end|>"


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_sentencepiece_tokenizer(arch, tmp_path):
    ours, theirs = tokenizers_of(tmp_path, sentencepiece, arch)
    assert_same_ids(ours, theirs)
    config = json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["add_bos_token"]) == ("<s>", "</s>", True)
    # The folder is one that transformers loads by itself.
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert again("Hello  world").input_ids == ours.encode("Hello  world").ids
