"""A mixture in a transformers model: put there, read from a folder, written to one."""

import dataclasses
import json
import pathlib
import re

import torch
from safetensors.torch import load_file, save_file

from moesaic.hf.modules import MoLoraLinear, MovFfn, MovHeads, MovInput, Router

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
T5_LINEARS = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]
KEYS, VALUES, DOWNS = ("k_proj", "k"), ("v_proj", "v"), ("down_proj", "wo")
TENSORS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "mov": "mov.weight", "router": "router.weight"}
PREFIX = "base_model.model."
# What an adapter_config.json may say besides what `load` reads: values under which it changes nothing here.
HARMLESS = {"use_dora": (False,), "bias": ("none",), "modules_to_save": (None, []), "rank_pattern": (None, {}),
            "alpha_pattern": (None, {})}


def parts_of(model):
    """(layer, path, module that holds it, its name) of every attention and feed-forward network, in order."""
    if model.config.model_type.startswith("t5gemma"):
        first = "encoder.text_model" if model.config.model_type == "t5gemma2" else "encoder"
        layers = [(f"model.{half}.layers.{i}", layer) for half in (first, "decoder")
                  for i, layer in enumerate(model.model.get_submodule(half).layers)]
        for index, (path, layer) in enumerate(layers):
            for name in ("self_attn", "cross_attn", "mlp"):
                if hasattr(layer, name):
                    yield index, f"{path}.{name}", layer, name
        return
    if model.config.is_encoder_decoder:
        index = 0
        for half in ("encoder", "decoder"):
            for i, block in enumerate(getattr(model, half).block):
                for j, sublayer in enumerate(block.layer):
                    name = next(n for n in ("SelfAttention", "EncDecAttention", "DenseReluDense") if hasattr(sublayer, n))
                    yield index, f"{half}.block.{i}.layer.{j}.{name}", sublayer, name
                index += 1
        return
    for index, layer in enumerate(model.model.layers):
        yield index, f"model.layers.{index}.self_attn", layer, "self_attn"
        yield index, f"model.layers.{index}.mlp", layer, "mlp"


@dataclasses.dataclass
class Settings:
    """What an adapter_config.json says of a mixture."""

    method: str  # mov | molora
    num_experts: object = 10  # E, or by layer {"0": 4, ...}
    targets: list = None  # names of linears; None: the method's own
    layers: list = None  # None: all
    feedforward: object = DOWNS  # MoV: targets that scale what they read; names, or a regex over paths
    rank: int = 8
    alpha: float = 16
    scale: float = None  # of the low-rank product; None: alpha / rank
    dropout: float = 0.0
    k_site: str = "auto"
    router: Router = dataclasses.field(default_factory=Router)
    written: dict = dataclasses.field(default_factory=dict)  # keys of a file that name its sites, to be written back

    def __post_init__(self):
        experts = [self.num_experts] if isinstance(self.num_experts, int) else list(self.num_experts.values())
        if min(experts) < 1 or (self.router.top_k and max(experts) > 1 and self.router.top_k > max(experts)):
            raise ValueError(f"num_experts: got {self.num_experts} with top_k {self.router.top_k}, expected 1 or more, and top_k of "
                             "them at most")
        if self.k_site not in ("auto", "output", "post_qk_norm"):
            raise ValueError(f"k_site: got {self.k_site!r}, expected auto, output or post_qk_norm")
        if self.rank < 1:
            raise ValueError(f"lora_rank: got {self.rank}, expected 1 or more")

    def scales_input(self, path):
        if isinstance(self.feedforward, str):
            return re.fullmatch(self.feedforward, path) is not None
        return path.rpartition(".")[2] in self.feedforward

    def experts_at(self, layer):
        if isinstance(self.num_experts, int):
            return self.num_experts
        if layer not in self.num_experts:
            raise ValueError(f"num_experts: got none for layer {layer}, expected one for every layer")
        return self.num_experts[layer]


def _experts_by_layer(ranges):
    """{"0-1": 4, "2": 8} -> {0: 4, 1: 4, 2: 8}."""
    found = {}
    for layers, experts in ranges.items():
        first, _, last = str(layers).partition("-")
        found.update({layer: experts for layer in range(int(first), int(last or first) + 1)})
    return found


class Mixture:
    """MoV or MoLoRA in a transformers model, which it changes in place."""

    def __init__(self, model, settings, form="plain", wanted=None):
        """wanted: which module paths are adapted; None: those that the settings name."""
        if form not in ("plain", "concat"):
            raise ValueError(f"form: got {form!r}, expected 'plain' or 'concat'")
        if hasattr(model, "_moesaic"):
            raise ValueError("the model has a mixture already, expected one without: load it anew")
        self.model, self.settings, self.form = model, settings, form
        parts = list(parts_of(model))
        names = {n for _, _, holder, part in parts for n, _ in getattr(holder, part).named_children()}
        if settings.targets is None:
            settings.targets = [n for n in LINEARS + T5_LINEARS if n in names and
                                (settings.method == "molora" or n in KEYS + VALUES + DOWNS)]
        unknown = [target for target in settings.targets if target not in names]
        if unknown:
            raise ValueError(f"targets: got {', '.join(unknown)}, expected some of {', '.join(sorted(names))}")
        self.wanted = wanted
        self.parameters = {}  # by the names of the file, without PEFT's prefix
        normed_keys = hasattr(getattr(parts[0][2], parts[0][3]), "k_norm")
        if settings.k_site == "auto":
            settings.k_site = "post_qk_norm" if normed_keys else "output"
        self._replaced, self._hooks = [], []
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            for layer, path, holder, name in parts:
                if settings.layers is None or layer in settings.layers:
                    (self._molora if settings.method == "molora" else self._mov)(layer, path, holder, name)
            if not self.parameters:
                raise ValueError(f"got no site, expected one: targets {settings.targets}, layers {settings.layers}")
        except BaseException:
            self.remove()
            raise
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        model._moesaic = self
        self._hooks.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))

    def remove(self):
        """Gives the model back as it was."""
        for holder, name, module in reversed(self._replaced):
            setattr(holder, name, module)
        for hook in self._hooks:
            hook.remove()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        if getattr(self.model, "_moesaic", None) is self:
            del self.model._moesaic

    def _begin(self, _, arguments, keywords):
        router = self.settings.router
        if not router.keeps:
            router.routed = {}
        mask = arguments[1] if len(arguments) > 1 else keywords.get("attention_mask")
        masks = {True: mask, False: keywords.get("decoder_attention_mask") if self.model.config.is_encoder_decoder else mask}
        router.masks = {of: each for of, each in masks.items() if each is not None and each.dim() == 2}

    def _adapts(self, path, name):
        return name in self.settings.targets if self.wanted is None else path in self.wanted

    def _width(self, holder):
        return getattr(holder, "hidden_size", None) or self.model.config.hidden_size

    def _router_width(self, own, hidden):
        return {"layer_input": hidden, "sentence": self.settings.router.sentence_dim}.get(self.settings.router.input, own)

    def _put(self, holder, name, module):
        self._replaced.append((holder, name, getattr(holder, name)))
        setattr(holder, name, module.train(self.model.training))
        for own, key in TENSORS.items():
            if getattr(module, own, None) is not None:
                self.parameters[f"{module.path}.{key}"] = getattr(module, own)
        return module

    def _molora(self, layer, path, holder, part):
        feed, wrapped, settings = getattr(holder, part), [], self.settings
        for name in [t for t in settings.targets if hasattr(feed, t) and self._adapts(f"{path}.{t}", t)]:
            base = getattr(feed, name)
            scale = settings.alpha / settings.rank if settings.scale is None else settings.scale
            wrapped.append(self._put(feed, name, MoLoraLinear(
                base, f"{path}.{name}", settings.experts_at(layer), settings.rank, scale, settings.dropout,
                self._router_width(base.in_features, self._width(holder)), settings.router, self.form)))
        self._pass_layer_input(feed, wrapped)

    def _mov(self, layer, path, holder, part):
        feed, wrapped, settings = getattr(holder, part), [], self.settings
        hidden, experts, router = self._width(holder), settings.experts_at(layer), settings.router
        names = [t for t in settings.targets if hasattr(feed, t) and self._adapts(f"{path}.{t}", t)]
        down = next((t for t in names if t in DOWNS and settings.scales_input(f"{path}.{t}")), None)
        others = [t for t in names if t != down and t not in KEYS + VALUES + ("q_proj", "q") and not settings.scales_input(f"{path}.{t}")]
        if others or (down is not None and len(names) > 1):
            raise ValueError(f"{path}: got MoV at {', '.join(names)}, expected keys, values, queries, what linears read, or the "
                             "feed-forward network's branch alone: the others are moesaic's own")
        if down is not None:
            width = self._router_width(getattr(feed, down).in_features, hidden)
            self._put(holder, part, MovFfn(feed, f"{path}.{down}", experts, width, router))
            return
        k = getattr(feed, "head_dim", None) or getattr(feed, "key_value_proj_dim", None)
        for name in names:
            base, place = getattr(feed, name), f"{path}.{name}"
            if settings.scales_input(place):
                module = self._put(feed, name, MovInput(base, place, experts, self._router_width(base.in_features, hidden), router))
            else:
                heads = base.out_features // k
                point = "k_norm" if name == "k_proj" and settings.k_site == "post_qk_norm" else name
                own = k if router.head_wise else heads * k
                first = point == "k_norm" and self.model.config.model_type in ("gemma3_text", "t5gemma2")
                module = self._put(feed, point, MovHeads(getattr(feed, point), place, experts, heads, k,
                                                         self._router_width(own, hidden), router, heads_first=first))
            wrapped.append(module)
        self._pass_layer_input(feed, wrapped)

    def _pass_layer_input(self, half, wrapped):
        def remember(attention, arguments, keywords):
            # Keys and values of cross-attention are made of the encoder's states.
            sources = keywords.get("key_value_states", keywords.get("encoder_hidden_states"))
            of_sources = [] if sources is None else [getattr(attention, n) for n in KEYS + VALUES if hasattr(attention, n)]
            for module in wrapped:
                own = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
                module.layer_input = sources if any(module is m for m in of_sources) else own

        if wrapped and self.settings.router.input == "layer_input":
            self._hooks.append(half.register_forward_pre_hook(remember, with_kwargs=True))

    def config(self):
        """adapter_config.json."""
        settings = self.settings
        experts = settings.num_experts
        config = {"peft_type": settings.method.upper(),
                  "task_type": "SEQ_2_SEQ_LM" if self.model.config.is_encoder_decoder else "CAUSAL_LM",
                  "base_model_name_or_path": getattr(self.model, "name_or_path", "") or "", "target_modules": settings.targets,
                  "moesaic": {"num_experts": experts if isinstance(experts, int) else {str(i): e for i, e in experts.items()},
                              "k_site": settings.k_site, "router": settings.router.block()}}
        if settings.layers is not None:
            config["layers_to_transform"] = list(settings.layers)
        config.update(settings.written)
        if settings.method == "mov":
            feedforward = settings.feedforward
            return {**config, "feedforward_modules": feedforward if isinstance(feedforward, str) else
                    [t for t in settings.targets if t in feedforward]}
        scale = {} if settings.scale is None else {"use_rslora": settings.scale == settings.alpha / settings.rank**0.5}
        return {**config, "r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout, **scale}

    def save(self, folder):
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({PREFIX + name: p.detach().float().cpu().contiguous() for name, p in self.parameters.items()},
                  folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(self.config(), indent=2) + "\n")
        return folder


def attach(model, method, *, num_experts=10, lora_rank=8, lora_alpha=16, lora_dropout=0.0, targets=None, layers=None,
           k_site="auto", router=None, form="plain"):
    """Puts a new MoV or MoLoRA into `model`, whose own weights stop requiring gradients; it begins as the model itself.

    num_experts: E, or a list by layer. targets: names of linears. router: the keys of a run file's `router`. form: how
    MoLoRA is computed: "plain", every expert by itself, or "concat", one low-rank product; equal but for rounding.
    Returns the Mixture, whose `parameters` are the trained tensors by name.
    """
    if method not in ("mov", "molora"):
        raise ValueError(f"method: got {method!r}, expected 'mov' or 'molora'; LoRA and (IA)^3 are PEFT's")
    experts = dict(enumerate(num_experts)) if isinstance(num_experts, (list, tuple)) else num_experts
    return Mixture(model, Settings(method, experts, targets, layers, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout,
                                   k_site=k_site, router=Router(**(router or {}))), form)


def load(model, folder, form="plain"):
    """Puts the MoV or MoLoRA of a folder into `model`, frozen in evaluation mode as everything else until you say otherwise.

    Every tensor finds its site and every site its tensors, or one ValueError names all that do not.
    """
    folder = pathlib.Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    kind = config.get("peft_type", "")
    if kind not in ("MOV", "MOLORA"):
        raise ValueError(f"{folder}: got an adapter of type {kind}, expected MOV or MOLORA; LORA and IA3 are PEFT's to load")
    for key, values in HARMLESS.items():
        if key in config and config[key] not in values:
            raise ValueError(f"{folder}: got {key} {config[key]!r}, expected none: moesaic itself reads it")
    own = config["moesaic"]
    router = Router(**own["router"])
    if router.input == "sentence" and router.sentence_source != "column":
        raise ValueError(f"{folder}: its routers read sentence vectors of {router.sentence_source!r}, expected those of a column")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    sites = {name.removesuffix("." + key) for name in tensors for key in TENSORS.values() if name.endswith("." + key)}
    rank, alpha, feedforward = config.get("r", 8), config.get("lora_alpha", 16), config.get("feedforward_modules") or ()
    experts = own["num_experts"]
    mixture = Mixture(model, Settings(
        "molora" if kind == "MOLORA" else "mov", experts if isinstance(experts, int) else _experts_by_layer(experts),
        sorted({site.rpartition(".")[2] for site in sites}), None,
        feedforward if isinstance(feedforward, str) else tuple(name.rpartition(".")[2] for name in feedforward), rank, alpha,
        alpha / rank**0.5 if config.get("use_rslora") else alpha / rank, config.get("lora_dropout", 0.0), own["k_site"], router,
        {key: config[key] for key in ("target_modules", "layers_to_transform", "exclude_modules") if config.get(key) is not None}),
        form, wanted=sites)
    there = mixture.parameters
    wrong = [f"{name}: no such site" for name in tensors.keys() - there.keys()]
    wrong += [f"{name}: missing in the file" for name in there.keys() - tensors.keys()]
    wrong += [f"{name}: got {list(tensors[name].shape)}, expected {list(there[name].shape)}"
              for name in tensors.keys() & there.keys() if tensors[name].shape != there[name].shape]
    if wrong:
        mixture.remove()
        raise ValueError(f"{folder}: it does not fit this model:\n  " + "\n  ".join(sorted(wrong)))
    with torch.no_grad():
        for name, parameter in there.items():
            parameter.copy_(tensors[name])
            parameter.requires_grad_(False)
    return mixture


def _of(model):
    if not hasattr(model, "_moesaic"):
        raise ValueError("the model has no mixture, expected one of hf.attach or hf.load")
    return model._moesaic


def save(model, folder):
    """Writes the folder that `moesaic --adapter`, `ms.load` and `hf.load` read."""
    return _of(model).save(folder)


def sentences(model, vectors):
    """The sentence vectors [B, d_e] that routers with the input `sentence` read in the calls that follow."""
    _of(model).settings.router.sentence = vectors


def routes(model):
    """Of the model's last call: the routers' probabilities by site, [B, T, E] (of per-head routers [B, T, H, E])."""
    return {site: passes[-1][2] for site, passes in _of(model).settings.router.routed.items()}


def losses(model):
    """{"balance", "z"} of the model's last call, means over the routers; real tokens count (attention_mask)."""
    return dict(zip(("balance", "z"), _of(model).settings.router.losses()))
