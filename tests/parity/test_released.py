"""Checkpoints of the paper's released code (google-deepmind/calm), converted: logits, loss and gradients are its own.

The released code needs an older transformers than the tests have, so `Released` spells its modules out under the names
of its checkpoints. Every position sees every other one, also the future; the mask of padding is never used.
"""

import json
import pathlib
import subprocess

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

import common
from test_calm import CalmDriver, Tokenizers, make_model


class Hook(torch.nn.Module):
    """One connection, behind a decoder layer of the anchor."""

    def __init__(self, anchor_width, aug_width, heads, eps):
        super().__init__()
        self.proj = torch.nn.Linear(aug_width, anchor_width)
        self.post_attention_layernorm = GemmaRMSNorm(anchor_width, eps=eps)
        self.cross_attention = torch.nn.MultiheadAttention(anchor_width, heads, kdim=anchor_width, vdim=anchor_width,
                                                           batch_first=True)
        self.aug_state = None

    def forward(self, h):
        states = self.proj(self.aug_state)
        y, _ = self.cross_attention(h, states, states, need_weights=True)
        return self.post_attention_layernorm(y) + h


class Released(torch.nn.Module):
    def __init__(self, anchor, aug, pairs, heads):
        super().__init__()
        self.anchor_model, self.aug_model, self.pairs = anchor, aug, pairs
        self.cross_attention_hooks = torch.nn.ModuleList(
            Hook(anchor.config.hidden_size, aug.config.hidden_size, heads, anchor.config.rms_norm_eps) for _ in pairs)
        for hook, (anchor_block, aug_block) in zip(self.cross_attention_hooks, pairs):
            aug.model.layers[aug_block].register_forward_hook(lambda m, x, y, hook=hook: setattr(hook, "aug_state", y))
            anchor.model.layers[anchor_block].register_forward_hook(lambda m, x, y, hook=hook: hook(y))

    def forward(self, ids):
        with torch.no_grad():
            self.aug_model(input_ids=torch.tensor([ids]), use_cache=False)
        return self.anchor_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    def numbers(self, ids, mask):
        """(logits, loss, gradients by the checkpoint's names)."""
        logits = torch.cat([self(sequence) for sequence in ids])
        loss = common.loss_of(logits, ids, mask)
        loss.backward()
        gradients = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
        return logits.detach(), loss.detach(), gradients


def our_gradients(gradients, pairs):
    """The released names' gradients under ours: in_proj is q, k and v on top of each other."""
    result = {}
    for k in range(len(pairs)):
        old, new = f"cross_attention_hooks.{k}", f"connections.{k}"
        for kind in ("weight", "bias"):
            result[f"{new}.proj.{kind}"] = gradients[f"{old}.proj.{kind}"]
            result[f"{new}.o_proj.{kind}"] = gradients[f"{old}.cross_attention.out_proj.{kind}"]
            for name, part in zip("qkv", gradients[f"{old}.cross_attention.in_proj_{kind}"].chunk(3)):
                result[f"{new}.{name}_proj.{kind}"] = part
        result[f"{new}.norm.weight"] = gradients[f"{old}.post_attention_layernorm.weight"]
    return result


def convert(*arguments):
    return subprocess.run([common.BUILD / "moesaic", "convert", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def driver():
    torch.set_num_threads(1)
    running = CalmDriver()
    yield running
    running.close()


def make_released(tmp_path, family, pairs, heads, rms_norm_eps):
    vocab = Tokenizers().size("gpt2")
    anchor = make_model(tmp_path / "anchor", family, "gpt2", vocab, 1, num_hidden_layers=5, rms_norm_eps=rms_norm_eps)
    aug = make_model(tmp_path / "aug", family, "gpt2", vocab, 2, num_hidden_layers=4, hidden_size=28)
    model = Released(anchor, aug, pairs, heads)
    common.randomise(model.cross_attention_hooks, 3)
    with torch.no_grad():
        for parameter in model.cross_attention_hooks.parameters():
            if parameter.dim() == 2:  # else attention saturates, and its gradients are differences of nearly equal numbers
                parameter.mul_(0.5)
    return model


def config_of(tmp_path, **keys):
    """As transformers writes it: what equals the class's default is left out."""
    return {"architectures": ["CALM"], "model_type": "calm", "anchor_model": str(tmp_path / "anchor"),
            "aug_model": str(tmp_path / "aug"), "connections": None, "num_connections": None, **keys}


def write_pickle(model, folder):
    torch.save(dict(model.state_dict()), folder / "pytorch_model.bin")


def write_pickle_shards(model, folder):
    state, index = model.state_dict(), {}
    names = list(state)
    for i, part in enumerate([names[:len(names) // 2], names[len(names) // 2:]]):
        shard = f"pytorch_model-{i + 1:05}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / shard)
        index |= dict.fromkeys(part, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


def write_state_dict(model, folder):
    """With its attributes, the versions of modules."""
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def write_safetensors(model, folder):
    """The connections alone."""
    save_file({n: t.clone() for n, t in model.state_dict().items() if n.startswith("cross_attention_hooks.")},
              folder / "model.safetensors")


@pytest.mark.parametrize("family, eps, heads, pairs, keys, write", [
    # 5 and 4 blocks: floor(linspace) of 3 gives 0, 2, 4 and 0, 1, 3.
    ("gemma", 1e-6, 4, [(0, 0), (2, 1), (4, 3)], dict(num_connections=3, num_heads=4), write_pickle),
    ("llama", 1e-2, 1, [(3, 0), (1, 2)], dict(connections=[[3, 0], [1, 2]]), write_state_dict),
    ("gemma2", 1e-6, 2, [(0, 0), (4, 3)], dict(num_connections=2, num_heads=2), write_pickle_shards),
    ("llama", 1e-5, 2, [(4, 3)], dict(connections=[[4, 3]], num_heads=2), write_safetensors),
])
def test_converted_checkpoints_give_the_released_numbers(family, eps, heads, pairs, keys, write, driver, tmp_path):
    model = make_released(tmp_path, family, pairs, heads, eps)
    released, ours = tmp_path / "released", tmp_path / "ours"
    released.mkdir()
    write(model, released)
    (released / "config.json").write_text(json.dumps(config_of(tmp_path, **keys)))
    done = convert(released, ours)
    assert done.returncode == 0, done.stderr
    assert "mask full" in done.stdout

    vocab = model.anchor_model.config.vocab_size
    ids = common.sequences(vocab)
    mask = common.masks(ids)
    result = driver.run(tmp_path / "out.safetensors", composition=ours, sequences=ids, mask=mask)
    # Exact arithmetic on the same numbers: what is left is our rounding.
    model.double()
    logits, loss, gradients = model.numbers(ids, mask)
    common.assert_close(result["logits"], logits, "logits")
    common.assert_close(result["loss"], loss, "loss")
    expected, got = our_gradients(gradients, pairs), common.split_gradients(result)
    for name in [n for n in expected if n.endswith("k_proj.bias")]:  # 0 but for rounding: softmax ignores a shift
        limit = common.RELATIVE * expected[name.replace("k_proj", "q_proj")].abs().max()
        assert expected.pop(name).abs().max() <= limit and got.pop(name).abs().max() <= limit
    common.assert_gradients_close(got, expected)


def test_a_pickle_that_would_execute_something_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "executed",)

    model = make_released(tmp_path, "llama", [(0, 0)], 1, 1e-5)
    (tmp_path / "released").mkdir()
    torch.save({**model.state_dict(), "x": Attack()}, tmp_path / "released" / "pytorch_model.bin")
    (tmp_path / "released" / "config.json").write_text(json.dumps(config_of(tmp_path, num_connections=1)))
    done = convert(tmp_path / "released", tmp_path / "ours")
    assert done.returncode == 3
    assert "pathlib.Path.touch" in done.stderr or "names" in done.stderr and "Nothing was executed" in done.stderr
    assert not (tmp_path / "executed").exists() and not (tmp_path / "ours").exists()
