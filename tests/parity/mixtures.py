"""MoV and MoLoRA written down plainly on top of transformers' modules, straight from the papers' equations.

Every expert's output is computed and then mixed; nothing is fused, so gradients come from autograd alone. Parameters are
kept in the layouts of the adapter file: lora_A [E, r, in], lora_B [E, out, r], mov [E, H, k] or [E, width], router
[E, d_u].
"""

import json
import pathlib

import torch
from safetensors.torch import save_file
from torch import nn

import common

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
T5_LINEARS = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]
KEYS, VALUES, DOWNS = ("k_proj", "k"), ("v_proj", "v"), ("down_proj", "wo")


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


class Mixing:
    """The `router` block of an adapter, and the inputs a router may read besides its own."""

    def __init__(self, input="token", top_k=0, topk_mode="mask", temperature=1.0, sentence_dim=0, head_wise=True,
                 logits="signed"):
        self.input, self.top_k, self.topk_mode, self.temperature = input, top_k, topk_mode, temperature
        self.sentence_dim, self.head_wise, self.logits = sentence_dim, head_wise, logits
        self.sentence = None  # [d_e], of the sequence being run
        self.routed = {}  # by router: the logits [rows, E] and the weights [rows, E] of every sequence run

    def block(self):
        return {"type": "top_k" if self.top_k else "soft", "top_k": self.top_k, "topk_mode": self.topk_mode,
                "input": self.input, "temperature": self.temperature, "sentence_dim": self.sentence_dim,
                "sentence_source": "column", "head_wise": self.head_wise, "logits": self.logits}

    def weights(self, router, u):
        """u [..., d_u] -> what mixes the experts, [..., E]."""
        logits = torch.einsum("...d,ed->...e", u.float(), router) / self.temperature
        logits = logits.abs() if self.logits == "absolute" else logits
        weights = self._weights(torch.softmax(logits, dim=-1))
        rows = slice(0, 1) if self.input == "sentence" else slice(None)  # one decision a sequence
        self.routed.setdefault(id(router), []).append((logits.flatten(0, -2)[rows], weights.flatten(0, -2)[rows]))
        return weights

    def _weights(self, probabilities):
        if not self.top_k:
            return probabilities
        kept = torch.topk(probabilities, self.top_k, dim=-1).indices
        mask = torch.zeros_like(probabilities).scatter(-1, kept, 1.0)
        weights = probabilities * mask
        if self.topk_mode == "renorm":
            weights = weights / weights.sum(-1, keepdim=True)
        return weights

    def losses(self):
        """(balance loss, z-loss) of what was routed since the last call, the means over all routers."""
        balance, z = [], []
        for passes in self.routed.values():
            logits, weights = (torch.cat(parts) for parts in zip(*passes))
            experts = logits.shape[1]
            if self.top_k and self.top_k < experts:
                chosen = (weights > 0).float()  # the kept slots
            else:
                chosen = torch.nn.functional.one_hot(logits.argmax(-1), experts).float()
            share = chosen.sum(0) / chosen.sum()
            balance.append(experts * (share * logits.softmax(-1).mean(0)).sum())
            z.append((torch.logsumexp(logits, -1) ** 2).mean())
        self.routed = {}
        return sum(balance) / len(balance), sum(z) / len(z)

    def merge(self, weights, vectors, equation):
        """The merged vector sum_e s_e l_e, or 1 + sum_e s_e (l_e - 1) over the kept experts."""
        if self.top_k and self.topk_mode == "residual":
            return 1 + torch.einsum(equation, weights, vectors - 1)
        return torch.einsum(equation, weights, vectors)


class MoLoraLinear(nn.Module):
    """y = x W^T + b + scale * sum_e s_e B_e A_e x."""

    def __init__(self, base, experts, rank, scale, router_width, mixing, draw):
        super().__init__()
        self.base, self.scale, self.mixing = base, scale, mixing
        self.lora_A = nn.Parameter(draw(experts, rank, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(draw(experts, base.out_features, rank) / rank**0.5)
        self.router = nn.Parameter(draw(experts, router_width) / router_width**0.5) if experts > 1 else None
        self.layer_input = None

    @property
    def weight(self):  # transformers asks a T5's wo for its number format
        return self.base.weight

    def forward(self, x):
        if self.router is None:
            weights = torch.ones(*x.shape[:-1], 1)
        else:
            u = {"token": x, "ffn_product": x, "layer_input": self.layer_input}.get(self.mixing.input)
            if self.mixing.input == "sentence":
                u = self.mixing.sentence.expand(*x.shape[:-1], -1)
            weights = self.mixing.weights(self.router, u)
        low = torch.einsum("bsi,eri->bser", x, self.lora_A)
        outputs = torch.einsum("bser,eor->bseo", low, self.lora_B)
        return self.base(x) + self.scale * torch.einsum("bse,bseo->bso", weights, outputs)


class MovHeads(nn.Module):
    """K' = K * sum_e s_e l_e per head: around k_proj or v_proj ([B, S, H*k]) or around k_norm ([B, S, H, k]).

    With `heads_first` the norm sees [B, H, S, k], as in transformers' Gemma 3.
    """

    def __init__(self, base, experts, heads, width, router_width, mixing, draw, heads_first=False):
        super().__init__()
        self.base, self.heads, self.width, self.mixing, self.heads_first = base, heads, width, mixing, heads_first
        shape = (heads, width) if mixing.head_wise else (heads * width,)
        self.mov = nn.Parameter(1 + 0.3 * draw(experts, *shape))
        self.router = nn.Parameter(draw(experts, router_width) / router_width**0.5) if experts > 1 else None
        self.layer_input = None

    def forward(self, x):
        if self.heads_first:
            return self._scaled(self.base(x).transpose(1, 2)).transpose(1, 2)
        return self._scaled(self.base(x))

    def _scaled(self, y):
        heads = y.reshape(*y.shape[:2], self.heads, self.width)
        if self.router is None:
            return (heads * self.mov[0].view(-1, self.width)).view(y.shape)
        if not self.mixing.head_wise:  # one vector over all heads, and a router that reads them together
            flat = heads.flatten(2)
            u = {"token": flat, "layer_input": self.layer_input}[self.mixing.input]
            weights = self.mixing.weights(self.router, u)
            return (flat * self.mixing.merge(weights, self.mov, "bse,ef->bsf")).view(y.shape)
        if self.mixing.input in ("token", "ffn_product"):
            weights = self.mixing.weights(self.router, heads)
        else:
            u = self.layer_input if self.mixing.input == "layer_input" else self.mixing.sentence.expand(*y.shape[:2], -1)
            weights = self.mixing.weights(self.router, u).unsqueeze(2).expand(-1, -1, self.heads, -1)
        return (heads * self.mixing.merge(weights, self.mov, "bshe,ehk->bshk")).view(y.shape)


class MovInput(nn.Module):
    """y = W (x * sum_e s_e l_e) + b: MoV on what a linear reads."""

    def __init__(self, base, experts, router_width, mixing, draw):
        super().__init__()
        self.base, self.mixing = base, mixing
        self.mov = nn.Parameter(1 + 0.3 * draw(experts, base.in_features))
        self.router = nn.Parameter(draw(experts, router_width) / router_width**0.5)
        self.layer_input = None

    def forward(self, x):
        u = self.layer_input if self.mixing.input == "layer_input" else x
        return self.base(x * self.mixing.merge(self.mixing.weights(self.router, u), self.mov, "bse,ei->bsi"))


class MovFfn(nn.Module):
    """down( (act(gate x) * sum_e s_e l_e) * up x ), in place of a model's MLP; without `up` where it has no gate."""

    def __init__(self, mlp, experts, router_width, mixing, draw):
        super().__init__()
        self.mlp, self.mixing = mlp, mixing
        if hasattr(mlp, "down_proj"):
            self.act, self.gate, self.up, self.down = mlp.act_fn, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        else:
            self.act, self.gate, self.up, self.down = (
                mlp.act, getattr(mlp, "wi_0", None) or mlp.wi, getattr(mlp, "wi_1", None), mlp.wo)
        width = self.down.in_features
        self.mov = nn.Parameter(1 + 0.3 * draw(experts, width))
        self.router = nn.Parameter(draw(experts, router_width) / router_width**0.5) if experts > 1 else None

    def forward(self, x):
        act, up = self.act(self.gate(x)), self.up(x) if self.up is not None else torch.ones(())
        if self.router is None:
            return self.down(act * self.mov[0] * up)
        u = {"token": act, "ffn_product": act * up, "layer_input": x}.get(self.mixing.input)
        if self.mixing.input == "sentence":
            u = self.mixing.sentence.expand(*x.shape[:-1], -1)
        merged = self.mixing.merge(self.mixing.weights(self.router, u), self.mov, "bse,ef->bsf")
        return self.down(act * merged * up)


class Mixture:
    """Puts MoV or MoLoRA into a transformers model (changing it) and knows the adapter file that says the same."""

    def __init__(self, model, method, experts=3, rank=2, alpha=None, targets=None, k_site="auto", seed=1,
                 input_targets=DOWNS, **mixing):
        """experts: of every layer, or a list by layer; input_targets: MoV's targets that scale their input."""
        self.model, self.method, self.rank = model, method, rank
        seq2seq = model.config.is_encoder_decoder
        self.alpha = alpha or (1.0 if seq2seq else 3.0)  # scores of T5 are not divided by sqrt(k)
        layers = len({index for index, *_ in parts_of(model)})
        self.layer_experts = experts if isinstance(experts, list) else [experts] * layers
        self.num_experts = {str(i): e for i, e in enumerate(experts)} if isinstance(experts, list) else experts
        self.input_targets = input_targets
        self.mixing = Mixing(**mixing)
        if targets is None:
            there = {n for _, _, holder, part in parts_of(model) for n, _ in getattr(holder, part).named_children()}
            targets = [n for n in LINEARS + T5_LINEARS if n in there and (method == "molora" or n in KEYS + VALUES + DOWNS)]
        self.targets = targets
        generator = torch.Generator().manual_seed(seed)
        self.draw = lambda *shape: torch.randn(shape, generator=generator)
        self.parameters = {}
        parts = list(parts_of(model))
        normed_keys = hasattr(getattr(parts[0][2], parts[0][3]), "k_norm")
        self.k_site = ("post_qk_norm" if normed_keys else "output") if k_site == "auto" else k_site
        for index, path, holder, name in parts:
            (self._molora if method == "molora" else self._mov)(index, path, holder, name)

    def _width(self, holder):
        return getattr(holder, "hidden_size", None) or self.model.config.hidden_size

    def _router_width(self, own, hidden):
        return {"layer_input": hidden, "sentence": self.mixing.sentence_dim}.get(self.mixing.input, own)

    def _register(self, path, module, names):
        for name, key in names.items():
            parameter = getattr(module, name)
            if parameter is not None:
                self.parameters[f"{path}.{key}"] = parameter

    def _molora(self, index, path, holder, part):
        feed, wrapped = getattr(holder, part), []
        for name in [t for t in self.targets if hasattr(feed, t)]:
            base = getattr(feed, name)
            hidden = self._width(holder)
            module = MoLoraLinear(base, self.layer_experts[index], self.rank, self.alpha / self.rank,
                                  self._router_width(base.in_features, hidden), self.mixing, self.draw)
            setattr(feed, name, module)
            wrapped.append(module)
            self._register(f"{path}.{name}", module,
                           {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "router": "router.weight"})
        self._pass_layer_input(feed, wrapped)

    def _mov(self, index, path, holder, part):
        feed, hidden, wrapped = getattr(holder, part), self._width(holder), []
        names = {"mov": "mov.weight", "router": "router.weight"}
        down = next((t for t in self.targets if t in DOWNS and hasattr(feed, t)), None)
        if down is not None:
            width = getattr(feed, down).in_features
            module = MovFfn(feed, self.layer_experts[index], self._router_width(width, hidden), self.mixing, self.draw)
            setattr(holder, part, module)
            self._register(f"{path}.{down}", module, names)
            return
        k = getattr(feed, "head_dim", None) or getattr(feed, "key_value_proj_dim", None)
        for name in [t for t in self.targets if hasattr(feed, t)]:
            base = getattr(feed, name)
            if name in self.input_targets:
                module = MovInput(base, self.layer_experts[index], self._router_width(base.in_features, hidden),
                                  self.mixing, self.draw)
                setattr(feed, name, module)
            else:
                heads = base.out_features // k
                point = "k_norm" if name == "k_proj" and self.k_site == "post_qk_norm" else name
                own = k if self.mixing.head_wise else heads * k
                module = MovHeads(getattr(feed, point), self.layer_experts[index], heads, k,
                                  self._router_width(own, hidden), self.mixing, self.draw,
                                  heads_first=point == "k_norm" and self.model.config.model_type in ("gemma3_text", "t5gemma2"))
                setattr(feed, point, module)
            wrapped.append(module)
            self._register(f"{path}.{name}", module, names)
        self._pass_layer_input(feed, wrapped)

    def _pass_layer_input(self, half, wrapped):
        def remember(attention, args, kwargs):
            # Keys and values of cross-attention are made of the encoder's states.
            sources = kwargs.get("key_value_states", kwargs.get("encoder_hidden_states"))
            of_sources = [] if sources is None else [getattr(attention, n) for n in KEYS + VALUES if hasattr(attention, n)]
            for module in wrapped:
                own = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                module.layer_input = sources if any(module is m for m in of_sources) else own

        half.register_forward_pre_hook(remember, with_kwargs=True)

    def config(self):
        """adapter_config.json."""
        task = "SEQ_2_SEQ_LM" if self.model.config.is_encoder_decoder else "CAUSAL_LM"
        config = {"peft_type": self.method.upper(), "task_type": task, "target_modules": self.targets,
                  "moesaic": {"num_experts": self.num_experts, "k_site": self.k_site, "router": self.mixing.block()}}
        if self.method == "molora":
            return {**config, "r": self.rank, "lora_alpha": self.alpha}
        return {**config, "feedforward_modules": [t for t in self.targets if t in self.input_targets]}

    def save(self, folder):
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config()))
        save_file({f"base_model.model.{name}": p.detach().contiguous() for name, p in self.parameters.items()},
                  folder / "adapter_model.safetensors")
        return folder

    def logits(self, ids, sentence=None):
        """[N, V], one sequence at a time; sentence: [B, d_e]."""
        rows = []
        for b, s in enumerate(ids):
            self.mixing.sentence = None if sentence is None else sentence[b]
            rows.append(common.reference_logits(self.model, [s]))
        return torch.cat(rows)

    def gradients(self):
        return {name: p.grad for name, p in self.parameters.items()}
