"""Compositions against a plain PyTorch transcription: logits, loss and the gradient of every connection."""

import json
import pathlib
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

import common

GOLDEN = common.ROOT / "tests" / "compose" / "golden"
TEXTS = ["The keeper wrote until tomorrow, and", "Möwen 👍🏽 über den Dächern 12", "x", "คนเฝ้า ประภาคาร book"]


class CalmDriver(common.Driver):
    @staticmethod
    def executable():
        return common.BUILD / "tests" / "parity" / "calm_driver"


@pytest.fixture(scope="module")
def driver():
    if not CalmDriver.executable().exists():
        pytest.fail(f"{CalmDriver.executable()} is missing: build the target calm_driver first")
    torch.set_num_threads(1)
    running = CalmDriver()
    yield running
    running.close()


class Tokenizers:
    """Model folders get a golden tokenizer; its ids are what the sequences are made of."""

    def __init__(self):
        import tokenizers
        self.load = {name: tokenizers.Tokenizer.from_file(str(GOLDEN / f"{name}.json"))
                     for name in ("gpt2", "llama3", "llama2")}

    def size(self, name):
        return self.load[name].get_vocab_size()

    def encode(self, name, text):
        return self.load[name].encode(text).ids


@pytest.fixture(scope="module")
def tokenizers():
    return Tokenizers()


def make_model(folder, family, tokenizer, vocab, seed, **changes):
    entry = common.FAMILIES[family]
    config = entry.config_class(**{**common.TINY, **entry.arguments, "vocab_size": vocab, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    common.randomise(model.float(), seed)
    model.eval().requires_grad_(False)
    model.save_pretrained(folder)
    shutil.copy(GOLDEN / f"{tokenizer}.json", pathlib.Path(folder) / "tokenizer.json")
    (pathlib.Path(folder) / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return model


def rotate(x, places, theta):
    """RoPE on [H, S, k]: pairs (i, i + k/2)."""
    half = x.shape[-1] // 2
    angles = places[:, None].to(x.dtype) / theta ** (torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Composition:
    """The formulas, one sequence at a time."""

    def __init__(self, anchor, augmenting, config, weights):
        self.anchor, self.augmenting, self.config = anchor, augmenting, config
        self.weights = {k: v.clone().requires_grad_("input_" not in k) for k, v in weights.items()}
        t5 = anchor.config.is_encoder_decoder
        self.theta = 10_000.0 if t5 else anchor.config.rope_parameters["rope_theta"]
        self.eps = anchor.config.layer_norm_epsilon if t5 else anchor.config.rms_norm_eps

    def linear(self, name, x):
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def unit_rows(self, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()

    def connection(self, k, h, states, visible, coordinates, places=None):
        """What is added to h, rows at `places` (all)."""
        places = torch.arange(len(h)) if places is None else places
        precision, norm = next(iter(self.weights.values())).dtype, self.config.get("norm")
        h_in, states = h.to(precision), states.to(precision)
        scale = self.config.get("output_scale", 0) * h_in.pow(2).mean(-1, keepdim=True).sqrt()
        if norm == "standard":
            mean, deviation = (self.weights[f"connections.{k}.input_{name}"] for name in ("mean", "deviation"))
            states = (states - mean) / deviation
        elif norm == "pre":
            states = self.unit_rows(states)
        if norm in ("pre", "standard"):
            h_in = self.unit_rows(h_in)
        p = self.linear(f"connections.{k}.proj", states)
        if f"connections.{k}.q_proj.weight" in self.weights:
            y = self.attention(k, h_in, p, visible, coordinates, places)
        else:
            y = p[visible.clamp(min=1) - 1]  # the newest alone
        return torch.where(visible[:, None] > 0, y * scale if self.config.get("output_scale") else y, 0).to(h.dtype)  # what sees nothing adds exactly nothing

    def attention(self, k, h_in, p, visible, coordinates, places):
        heads, rows = self.config["num_heads"], len(h_in)

        def split(name, x):
            return self.linear(f"connections.{k}.{name}", x).view(len(x), heads, -1).transpose(0, 1)

        q, key, value = split("q_proj", h_in), split("k_proj", p), split("v_proj", p)
        if self.config.get("cross_position", "rope") == "rope":
            q, key = rotate(q, places, self.theta), rotate(key, coordinates, self.theta)
        scores = q @ key.transpose(1, 2) / q.shape[-1] ** 0.5
        if self.config.get("cross_position") == "recency":
            apart = (places[:, None] - coordinates[None]).abs()
            scores = scores - self.weights[f"connections.{k}.slopes"][:, None, None] * apart
        hidden = torch.arange(len(p))[None] >= visible.clamp(min=1)[:, None]
        mixed = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value
        y = self.linear(f"connections.{k}.o_proj", mixed.transpose(0, 1).reshape(rows, -1))
        norm = self.weights.get(f"connections.{k}.norm.weight")
        if norm is not None:
            y = self.unit_rows(y) * (1 + norm)
        return y

    def taps(self, model, ids):
        """The output of the embedding (-1), of every block and of the norm behind them; of an encoder-decoder in its encoder."""
        states = {}
        reader = model.get_encoder() if model.config.is_encoder_decoder else model
        t5 = hasattr(reader, "block")
        layers = reader.block if t5 else reader.layers if reader is not model else model.model.layers
        hooks = [layers[0].register_forward_pre_hook(lambda m, x: states.update({-1: x[0][0]}))]
        for i, layer in enumerate(layers):
            # T5's blocks give the state and biases.
            hooks.append(layer.register_forward_hook(lambda m, x, y, i=i: states.update({i: (y[0] if t5 else y)[0]})))
        norm = reader.final_layer_norm if t5 else reader.norm if reader is not model else model.model.norm
        hooks.append(norm.register_forward_hook(lambda m, x, y: states.update({"final": y[0]})))
        with torch.no_grad():
            reader(input_ids=torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        return states

    def logits(self, ids, streams, prompt=None):
        """`streams`: for each augmenting model (tokens, visible, coordinates) of this sequence. prompt: tokens of it that
        an anchor's encoder reads."""
        by_block, k = {}, 0
        for model, entry, (tokens, visible, coordinates) in zip(self.augmenting, self.config["augmenting"], streams):
            text_so_far = entry.get("align") == "text"  # then tokens and coordinates are each position's
            states = [self.taps(model, each) for each in tokens] if text_so_far else self.taps(model, tokens) if tokens else {}
            for anchor_block, aug_block, *_ in entry["connections"]:
                at_block = [of[aug_block] for of in states] if text_so_far else states[aug_block]
                by_block.setdefault(anchor_block, []).append((k, at_block, visible, coordinates))
                k += 1

        def add(block, h):
            return h + sum(self.connection(k, h[0], *rest) for k, *rest in by_block[block])[None]

        def add_text_so_far(block, h):
            """Each position by itself, of an augmenting model that has read that position's text and nothing else."""
            return torch.stack([h[0, t] + sum(
                self.connection(k, h[0, t:t + 1], states[t], torch.tensor([len(states[t])]), places[t], torch.tensor([t]))[0]
                for k, states, _, places in by_block[block]) for t in range(len(ids))])[None]

        add = add_text_so_far if text_so_far else add
        if self.anchor.config.is_encoder_decoder:
            return self.encoder_decoder_logits(ids, by_block, prompt)
        layers, hooks = self.anchor.model.layers, []
        for block in by_block:
            if block == "final":
                hooks.append(self.anchor.model.norm.register_forward_hook(lambda m, x, y: add("final", y)))
            elif block < 0:
                hooks.append(layers[0].register_forward_pre_hook(
                    lambda m, args, kwargs: ((add(-1, args[0]), *args[1:]), kwargs), with_kwargs=True))
            else:
                hooks.append(layers[block].register_forward_hook(lambda m, x, y, block=block: add(block, y)))
        result = self.anchor(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        return result


    def encoder_decoder_logits(self, ids, by_block, prompt):
        """The decoder's rows are those of the text from the prompt's last token on, and see what these see."""
        first, blocks, hooks = prompt - 1, self.anchor.decoder.block, []

        def add(block, h):
            return h + sum(self.connection(k, h[0], states, visible[first:], coordinates, torch.arange(first, len(ids)))
                           for k, states, visible, coordinates in by_block[block])[None]

        for block in by_block:
            if block < 0:
                hooks.append(blocks[0].register_forward_pre_hook(lambda m, args: (add(-1, args[0]), *args[1:])))
            else:
                hooks.append(blocks[block].register_forward_hook(
                    lambda m, x, y, block=block: (add(block, y[0]), *y[1:])))
        result = common.reference_logits(self.anchor, [ids])
        for hook in hooks:
            hook.remove()
        return result


def of_sequence(stream, align, b, start, end):
    """What run_reference gives the transcription of one stream: with `align: text` every position's own reading."""
    tokens, visible, coordinates = stream["tokens"][b], stream["visible"][start:end], stream["coordinates"][b]
    if align != "text":
        return tokens, torch.tensor(visible), torch.tensor(coordinates)
    everything = tokens + (stream["asides"][b] if stream["asides"] else [])
    asides = stream["aside"][start:end] or [[0, 0]] * len(visible)
    keys = [[*range(count), *range(*aside)] for count, aside in zip(visible, asides)]
    return ([[everything[i] for i in of] for of in keys], None, [torch.tensor([coordinates[i] for i in of]) for of in keys])


def run_driver(driver, tmp_path, anchor, augmenting, config, ids, borders, dtype):
    """(tensors of the C++ side, its streams, the composition's folder)."""
    folder = tmp_path / "calm"
    spec = {**config, "anchor": str(anchor[1]),
            "augmenting": [{**entry, "model": str(path)} for entry, (_, path) in zip(config["augmenting"], augmenting)]}
    driver.call(create=spec, composition=folder, seed=11)
    job = dict(composition=folder, sequences=ids, mask=common.masks(ids), dtype=dtype)
    if borders:
        job["borders"] = borders
    ours = driver.run(tmp_path / "out.safetensors", **job)
    return ours, ours.pop("streams"), folder


def run_reference(anchor, augmenting, config, ids, streams, folder, dtype):
    """(logits, loss, gradients) with models in `dtype`; connections are float32, or float64 with the models."""
    anchor, augmenting = anchor[0].to(dtype), [model.to(dtype) for model, _ in augmenting]
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    weights = {k: v.to(precision) for k, v in load_file(folder / "calm_model.safetensors").items()}
    reference = Composition(anchor, augmenting, config, weights)
    rows, start = [], 0
    for b, sequence in enumerate(ids):
        end = start + len(sequence)
        per_sequence = [of_sequence(stream, entry.get("align"), b, start, end)
                        for stream, entry in zip(streams, config["augmenting"])]
        rows.append(reference.logits(sequence, per_sequence, common.prompt_lengths([sequence])[0]))
        start = end
    logits = torch.cat(rows)
    loss = common.loss_of(logits, ids, common.masks(ids))
    loss.backward()
    with torch.no_grad():
        plain = common.reference_logits(anchor, ids)
    assert (logits - plain).abs().max() > 0.05 * plain.abs().max(), "the connections have no effect"
    return logits.detach(), loss.detach(), {k: v.grad for k, v in reference.weights.items() if v.requires_grad}


def check(driver, tmp_path, anchor, augmenting, config, ids, borders=None, same_tokenizer=False):
    """float32 against the transcription in float64: the difference is our rounding alone."""
    ours, streams, folder = run_driver(driver, tmp_path, anchor, augmenting, config, ids, borders, "float32")
    if same_tokenizer:
        full = config["augmenting"][0].get("mask") == "full"
        assert streams[0]["tokens"] == ids
        assert streams[0]["coordinates"] == [list(range(len(s))) for s in ids]
        assert streams[0]["visible"] == [len(s) if full else t + 1 for s in ids for t in range(len(s))]
    logits, loss, gradients = run_reference(anchor, augmenting, config, ids, streams, folder, torch.float64)
    common.assert_close(ours["logits"], logits, "logits")
    common.assert_close(ours["loss"], loss, "loss")
    gradients_of_ours = common.split_gradients(ours)
    for name in [n for n in gradients if n.endswith("k_proj.bias") and config.get("cross_position") == "none"]:
        # A shift of all keys does nothing to a softmax: the gradient is 0 up to the rounding of its terms.
        limit = common.RELATIVE * gradients[name.replace("k_proj", "q_proj")].abs().max()
        assert gradients.pop(name).abs().max() <= limit and gradients_of_ours.pop(name).abs().max() <= limit
    common.assert_gradients_close(gradients_of_ours, gradients)


@pytest.fixture
def make(tmp_path, tokenizers):
    def build(name, family, tokenizer, seed, **changes):
        folder = tmp_path / name
        return make_model(folder, family, tokenizer, tokenizers.size(tokenizer), seed, **changes), folder
    return build


def ids_of(tokenizers, name):
    return [tokenizers.encode(name, text) for text in TEXTS]


def test_one_tokenizer(driver, make, tokenizers, tmp_path):
    config = dict(num_heads=4, augmenting=[dict(connections=[[0, 1], [2, 2]])])
    check(driver, tmp_path, make("anchor", "llama", "gpt2", 1), [make("aug", "qwen2", "gpt2", 2)], config,
          ids_of(tokenizers, "gpt2"), same_tokenizer=True)


@pytest.mark.parametrize("align", ["word", "token", "mixed"])
def test_two_tokenizers(align, driver, make, tokenizers, tmp_path):
    ids = ids_of(tokenizers, "gpt2")
    config = dict(num_heads=2, augmenting=[dict(connections=[[-1, 0], [1, 2]], align=align)])
    check(driver, tmp_path, make("anchor", "llama-tied-mqa", "gpt2", 1), [make("aug", "llama", "llama3", 2)], config, ids,
          borders=[[max(1, len(s) // 2)] for s in ids])


def test_without_positions(driver, make, tokenizers, tmp_path):
    config = dict(num_heads=4, cross_position="none", augmenting=[dict(connections=[[1, -1], [2, 1]])])
    check(driver, tmp_path, make("anchor", "qwen3", "llama3", 1), [make("aug", "llama", "gpt2", 2)], config,
          ids_of(tokenizers, "llama3"))


def test_norm_before_the_projections(driver, make, tokenizers, tmp_path):
    config = dict(num_heads=2, norm="pre", augmenting=[dict(connections=[[0, 1], [2, 2]])])
    check(driver, tmp_path, make("anchor", "llama", "gpt2", 1), [make("aug", "qwen2", "llama3", 2)], config,
          ids_of(tokenizers, "gpt2"))


@pytest.mark.parametrize("norm, cross_position", [("standard", "recency"), ("pre", "recency"), ("standard", "none")])
def test_final_states_recency_and_units(norm, cross_position, driver, make, tokenizers, tmp_path):
    config = dict(num_heads=2, norm=norm, cross_position=cross_position, output_scale=0.3,
                  augmenting=[dict(connections=[[0, 1], ["final", 2], [2, "final"], ["final", "final", "newest"]],
                                   align="token")])
    check(driver, tmp_path, make("anchor", "llama", "gpt2", 1), [make("aug", "qwen2", "llama3", 2)], config,
          ids_of(tokenizers, "gpt2"))


@pytest.mark.parametrize("cross_position", ["rope", "recency"])
def test_text_so_far(cross_position, driver, make, tokenizers, tmp_path):
    """Every position is that of an augmenting model which has read the text so far, as its tokenizer writes it."""
    ids = [tokenizers.encode("gpt2", text) for text in (*TEXTS, "def f(x):\n    return x**2  # 12")]
    config = dict(num_heads=2, cross_position=cross_position, norm="pre", augmenting=[
        dict(connections=[[0, 1], [2, 2], ["final", "final", "newest"]], align="text")])
    models = make("anchor", "llama", "gpt2", 1), [make("aug", "qwen2", "llama3", 2)]
    ours, streams, folder = run_driver(driver, tmp_path, *models, config, ids, None, "float32")
    assert sum(begin < end for begin, end in streams[0]["aside"]) > 10
    text = tokenizers.load["gpt2"].decode(ids[-1])
    known = of_sequence(streams[0], "text", len(ids) - 1, sum(map(len, ids[:-1])), sum(map(len, ids)))[0]
    assert known[-1][1:] == tokenizers.encode("llama3", text)  # behind BOS
    logits, loss, gradients = run_reference(*models, config, ids, streams, folder, torch.float64)
    common.assert_close(ours["logits"], logits, "logits")
    common.assert_close(ours["loss"], loss, "loss")
    common.assert_gradients_close(common.split_gradients(ours), gradients)


def test_two_augmenting_models(driver, make, tokenizers, tmp_path):
    ids = ids_of(tokenizers, "gpt2")
    config = dict(num_heads=2, augmenting=[dict(connections=[[0, 1], [2, 2]]),
                                           dict(connections=[[2, 0], [1, 1]], align="token", mask="prefix")])
    check(driver, tmp_path, make("anchor", "llama", "gpt2", 1),
          [make("first", "llama", "llama3", 2, num_hidden_layers=4), make("second", "mistral", "llama2", 3)], config, ids,
          borders=[[max(1, len(s) // 2)] for s in ids])


def make_seq2seq(folder, family, seed):
    """A T5 or T5Gemma with the golden unigram vocabulary; returns it, its folder and its tokenizer."""
    vocab = json.loads((GOLDEN / "unigram.json").read_text())["model"]["vocab"]
    tokenizer = transformers.T5Tokenizer(vocab=[tuple(piece) for piece in vocab], extra_ids=3)
    tokenizer.save_pretrained(folder)
    entry, size = common.FAMILIES[family], dict(vocab_size=len(tokenizer) + 2)
    halves = {half: {**of_half, **size} for half, of_half in entry.arguments.items() if half in ("encoder", "decoder")}
    config = common.Family(entry.config_class, halves or {**entry.arguments, **size}).config()
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
    common.randomise(model.float(), seed)
    model.eval().requires_grad_(False).save_pretrained(folder)
    return model, folder, tokenizer


def prompt_stream(tokenizer, anchor, ids, border):
    """What an encoder reads of one sequence: (tokens, visible, coordinates), said once more from the rule's words."""
    texts = [""]
    for t in range(border):  # a token that ends within a character tells nothing yet
        text = anchor.decode(ids[:t + 1])
        texts.append(texts[-1] if text.endswith("\ufffd") else text)
    texts = texts[1:]
    encoded = tokenizer(texts[-1], return_offsets_mapping=True)
    places = [next(t for t, text in enumerate(texts) if len(text) >= end) if end > begin else border - 1
              for begin, end in encoded["offset_mapping"]]
    count = len(encoded["input_ids"])
    return encoded["input_ids"], [0] * (border - 1) + [count] * (len(ids) - border + 1), places


@pytest.mark.parametrize("family, norm, cross_position", [("t5", "none", "rope"), ("t5gemma", "pre", "none"),
                                                          ("t5", "standard", "recency")])
def test_an_encoder_reads_the_prompt(family, norm, cross_position, driver, make, tokenizers, tmp_path):
    """An encoder beside a decoder-only augmenting model; nothing of the answer enters its encoder, nothing leaves it before."""
    ids = ids_of(tokenizers, "gpt2")
    borders = [[max(1, len(s) // 2)] for s in ids]
    model, folder, tokenizer = make_seq2seq(tmp_path / family, family, 5)
    config = dict(num_heads=2, norm=norm, cross_position=cross_position,
                  augmenting=[dict(connections=[[0, -1], [1, 0], [2, "final"]], mask="prefix"),
                              dict(connections=[[1, 1]], align="mixed")])
    models = make("anchor", "llama", "gpt2", 1), [(model, folder), make("aug", "qwen2", "llama3", 2)]
    _, streams, _ = run_driver(driver, tmp_path, *models, config, ids, borders, "float32")
    expected = [prompt_stream(tokenizer, tokenizers.load["gpt2"], s, b) for s, [b] in zip(ids, borders)]
    assert streams[0]["tokens"] == [tokens for tokens, _, _ in expected]
    assert streams[0]["coordinates"] == [places for _, _, places in expected]
    assert streams[0]["visible"] == [c for _, visible, _ in expected for c in visible]
    shutil.rmtree(tmp_path / "calm")
    check(driver, tmp_path, *models, config, ids, borders=borders)


@pytest.mark.parametrize("norm, cross_position, align", [("pre", "rope", "word"), ("none", "recency", "token")])
def test_an_encoder_decoder_as_the_anchor(norm, cross_position, align, driver, make, tmp_path):
    """T5's decoder reads a decoder's states and those of another T5's encoder."""
    anchor, folder, tokenizer = make_seq2seq(tmp_path / "t5", "t5", 5)
    reader, reader_folder, _ = make_seq2seq(tmp_path / "reader", "t5", 6)
    ids = [tokenizer.encode(text) for text in (*TEXTS[:2], "The keeper wrote of the lighthouse book until tomorrow")]
    config = dict(num_heads=2, norm=norm, cross_position=cross_position,
                  augmenting=[dict(connections=[[-1, 0], [0, 1], [1, 2]], align=align),
                              dict(connections=[[1, 1]], mask="prefix")])
    check(driver, tmp_path, (anchor, folder), [make("aug", "qwen2", "llama3", 2), (reader, reader_folder)], config, ids,
          borders=[[n] for n in common.prompt_lengths(ids)])


def test_released_form(driver, make, tokenizers, tmp_path):
    """The public code's own choices: every position sees all, norm behind the attention, biases, no positions."""
    config = dict(num_heads=2, cross_position="none", norm="post", attention_bias=True,
                  augmenting=[dict(connections=[[0, 0], [2, 2]], mask="full")])
    check(driver, tmp_path, make("anchor", "llama", "gpt2", 1), [make("aug", "llama", "gpt2", 2)], config,
          ids_of(tokenizers, "gpt2"), same_tokenizer=True)


def test_bfloat16(driver, make, tokenizers, tmp_path):
    """Models in bfloat16, connections in float32. Deep random models spread a last bit over everything, so the measure
    is the transcription in bfloat16 itself: on average ours is as near to the exact numbers as that is."""
    ids = ids_of(tokenizers, "gpt2")
    config = dict(num_heads=4, augmenting=[dict(connections=[[0, 1], [2, 2]])])
    models = make("anchor", "llama", "gpt2", 1), [make("aug", "llama", "llama3", 2)]
    ours, streams, folder = run_driver(driver, tmp_path, *models, config, ids, None, "bfloat16")
    rounded = run_reference(*models, config, ids, streams, folder, torch.bfloat16)
    # The same models, whose weights are now numbers of bfloat16, in exact arithmetic.
    exact = run_reference(*models, config, ids, streams, folder, torch.float64)

    def error(x, y):
        return (x.double() - y.double()).abs().mean().item()

    assert error(ours["logits"], exact[0]) <= 1.5 * error(rounded[0], exact[0])
    gradients = common.split_gradients(ours)
    assert sorted(gradients) == sorted(exact[2])
    total = {"ours": 0.0, "rounded": 0.0, "size": 0.0}
    for name, gradient in exact[2].items():
        total["ours"] += error(gradients[name], gradient)
        total["rounded"] += error(rounded[2][name], gradient)
        total["size"] += gradient.abs().mean().item()
    assert total["ours"] <= 1.5 * total["rounded"]
    assert total["ours"] <= 0.5 * total["size"]
