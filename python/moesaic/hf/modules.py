"""MoV and MoLoRA on transformers' modules, straight from the papers' equations (arXiv 2309.05444; docs/methods.md).

Parameters are float32, in the layouts of the adapter's file: lora_A [E, r, in], lora_B [E, out, r], mov [E, H, k] or
[E, width], router [E, d_u]. In the plain form every expert's output is computed and then mixed; gradients come from autograd
alone.
"""

import dataclasses
import re

import torch
from torch import nn


@dataclasses.dataclass
class Router:
    """The `router` block of an adapter, and what routers read and decided in the model's last call."""

    type: str = "soft"  # soft | top_k
    top_k: int = 0
    topk_mode: str = "mask"  # mask | renorm | residual
    input: str = "token"  # token | sentence | layer_input | ffn_product
    sentence_dim: int = 0
    sentence_source: str = "column"
    init_std: float = 0.02
    jitter: float = 0.0
    temperature: float = 1.0
    logits: str = "signed"  # signed | absolute
    head_wise: bool = True

    def __post_init__(self):
        for name, known in {"type": ("soft", "top_k"), "topk_mode": ("mask", "renorm", "residual"), "logits": ("signed", "absolute"),
                            "input": ("token", "sentence", "layer_input", "ffn_product")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"router.{name}: got {getattr(self, name)!r}, expected {', '.join(known)}")
        if not self.temperature > 0 or not 0 <= self.jitter < 1 or self.top_k < 0 or (self.type == "top_k" and not self.top_k):
            raise ValueError(f"router: got temperature {self.temperature}, jitter {self.jitter}, type {self.type}, top_k "
                             f"{self.top_k}, expected temperature above 0, jitter from 0 to below 1, top_k of 1 or more with its type")
        self.sentence = None  # [B, d_e], of the sequences being run
        self.masks = {}  # of real tokens [B, T], of an encoder's sites and of others; none = all are
        self.routed = {}  # by site: the logits [rows, E], what mixes [rows, E], and both once more as they were shaped
        self.keeps = False  # over several calls of the model
        if self.top_k:
            self.type = "top_k"

    def block(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def sentences_of(self, x):
        """[B, T, d_e], the same vector for all tokens of a sequence."""
        if self.sentence is None:
            raise ValueError(f"routers read sentence vectors [B, {self.sentence_dim}], and none were given: moesaic.hf.sentences")
        vectors = self.sentence.to(x.device)
        return vectors.view(-1, 1, vectors.shape[-1]).expand(*x.shape[:2], -1)

    def __call__(self, site, weight, u, training):
        """u [B, T, ..., d_u] -> what mixes the experts, [B, T, ..., E]."""
        u = u.float()
        if training and self.jitter:
            u = u * torch.empty_like(u).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = torch.einsum("...d,ed->...e", u, weight) / self.temperature
        logits = logits.abs() if self.logits == "absolute" else logits
        probabilities = torch.softmax(logits, dim=-1)
        weights = self._kept(probabilities)
        self.routed.setdefault(site, []).append((*(self._real(site, rows) for rows in (logits, weights)), probabilities))
        return weights

    def _real(self, site, rows):
        """The rows of real tokens; of a sentence's router one a sequence."""
        if self.input == "sentence":
            return rows[:, 0].flatten(0, -2)
        mask = self.masks.get(reads_encoder(site))
        return rows.flatten(0, -2) if mask is None else rows[mask[:, -rows.shape[1]:].bool()].flatten(0, -2)

    def _kept(self, probabilities):
        if not self.top_k:
            return probabilities
        kept = torch.topk(probabilities, self.top_k, dim=-1).indices
        weights = probabilities * torch.zeros_like(probabilities).scatter(-1, kept, 1.0)
        return weights / weights.sum(-1, keepdim=True) if self.topk_mode == "renorm" else weights

    def losses(self):
        """(balance, z), the means over all routers."""
        if not self.routed:
            raise ValueError("losses: got no router's decision, expected a call of the model before, and several experts")
        balance, z = [], []
        for passes in self.routed.values():
            logits, weights, _ = (torch.cat(parts) if i < 2 else None for i, parts in enumerate(zip(*passes)))
            experts = logits.shape[1]
            if self.top_k and self.top_k < experts:
                chosen = (weights > 0).float()  # the kept slots
            else:
                chosen = torch.nn.functional.one_hot(logits.argmax(-1), experts).float()
            share = chosen.sum(0) / chosen.sum()
            balance.append(experts * (share * logits.softmax(-1).mean(0)).sum())
            z.append((torch.logsumexp(logits, -1) ** 2).mean())
        if self.keeps:
            self.routed = {}
        return sum(balance) / len(balance), sum(z) / len(z)

    def merge(self, weights, vectors, equation):
        """The merged vector sum_e s_e l_e, or 1 + sum_e s_e (l_e - 1) over the kept experts."""
        if self.top_k and self.topk_mode == "residual":
            return 1 + torch.einsum(equation, weights, vectors - 1)
        return torch.einsum(equation, weights, vectors)


def reads_encoder(site):
    """Whether what stands at a site of an encoder-decoder is made of the source."""
    return ".encoder." in f".{site}" or re.search(r"(EncDecAttention|cross_attn)\.(k|v|k_proj|v_proj)$", site) is not None


def new_router(experts, width, router, device):
    if experts == 1:
        return None
    return nn.Parameter(torch.empty(experts, width, device=device).normal_(0, router.init_std))


class Site(nn.Module):
    """A module of the base in whose place this stands, and what a router reads beside its own input."""

    def __init__(self, base, path, router):
        super().__init__()
        self.base, self.path, self.mixing = base, path, router
        self.layer_input = None

    @property
    def weight(self):  # transformers asks a T5's wo for its number format
        return self.base.weight

    def route(self, u):
        return self.mixing(self.path, self.router, u, self.training)


class MoLoraLinear(Site):
    """y = x W^T + b + scale * sum_e s_e B_e A_e x."""

    def __init__(self, base, path, experts, rank, scale, dropout, router_width, router, form):
        super().__init__(base, path, router)
        device = base.weight.device
        self.scale, self.dropout, self.form = scale, dropout, form
        self.lora_A = nn.Parameter(torch.empty(experts, rank, base.in_features, device=device).normal_(0, 0.02))
        self.lora_B = nn.Parameter(torch.zeros(experts, base.out_features, rank, device=device))
        self.router = new_router(experts, router_width, router, device)

    def forward(self, x):
        if self.router is None:
            weights = torch.ones(*x.shape[:-1], 1, device=x.device)
        elif self.mixing.input == "sentence":
            weights = self.route(self.mixing.sentences_of(x))
        else:
            weights = self.route(self.layer_input if self.mixing.input == "layer_input" else x)
        read = torch.nn.functional.dropout(x, self.dropout, self.training).float()
        if self.form == "concat":
            experts, rank, width = self.lora_A.shape
            low = read @ self.lora_A.view(-1, width).T * weights.repeat_interleave(rank, dim=-1)
            mixed = low @ self.lora_B.transpose(1, 2).reshape(experts * rank, -1)
        else:
            low = torch.einsum("bsi,eri->bser", read, self.lora_A)
            mixed = torch.einsum("bse,bseo->bso", weights, torch.einsum("bser,eor->bseo", low, self.lora_B))
        return self.base(x) + (self.scale * mixed).to(x.dtype)


class MovHeads(Site):
    """K' = K * sum_e s_e l_e per head: around k_proj or v_proj ([B, S, H*k]) or around k_norm ([B, S, H, k]).

    With `heads_first` the norm sees [B, H, S, k], as in transformers' Gemma 3.
    """

    def __init__(self, base, path, experts, heads, width, router_width, router, heads_first=False):
        super().__init__(base, path, router)
        self.heads, self.width, self.heads_first = heads, width, heads_first
        device = base.weight.device
        self.mov = nn.Parameter(torch.ones(experts, *((heads, width) if router.head_wise else (heads * width,)), device=device))
        self.router = new_router(experts, router_width, router, device)

    def forward(self, x):
        if self.heads_first:
            return self._scaled(self.base(x).transpose(1, 2)).transpose(1, 2)
        return self._scaled(self.base(x))

    def _scaled(self, y):
        heads, mixing = y.float().reshape(*y.shape[:2], self.heads, self.width), self.mixing
        if self.router is None:
            scaled = heads * self.mov[0].view(-1, self.width)
        elif not mixing.head_wise:  # one vector over all heads, and a router that reads them together
            flat = heads.flatten(2)
            u = {"token": flat, "ffn_product": flat, "layer_input": self.layer_input}.get(mixing.input)
            weights = self.route(mixing.sentences_of(y) if u is None else u)
            scaled = flat * mixing.merge(weights, self.mov, "bse,ef->bsf")
        else:
            if mixing.input in ("token", "ffn_product"):
                weights = self.route(heads)
            else:
                u = self.layer_input if mixing.input == "layer_input" else mixing.sentences_of(y)
                weights = self.route(u).unsqueeze(2).expand(-1, -1, self.heads, -1)
            scaled = heads * mixing.merge(weights, self.mov, "bshe,ehk->bshk")
        return scaled.to(y.dtype).view(y.shape)


class MovInput(Site):
    """y = W (x * sum_e s_e l_e) + b: MoV on what a linear reads."""

    def __init__(self, base, path, experts, router_width, router):
        super().__init__(base, path, router)
        self.mov = nn.Parameter(torch.ones(experts, base.in_features, device=base.weight.device))
        self.router = new_router(experts, router_width, router, base.weight.device)

    def forward(self, x):
        if self.router is None:
            return self.base((x.float() * self.mov[0]).to(x.dtype))
        u = {"layer_input": self.layer_input, "sentence": None}.get(self.mixing.input, x)
        weights = self.route(self.mixing.sentences_of(x) if u is None else u)
        return self.base((x.float() * self.mixing.merge(weights, self.mov, "bse,ei->bsi")).to(x.dtype))


class MovFfn(Site):
    """down( (act(gate x) * sum_e s_e l_e) * up x ), in place of a model's MLP; without `up` where it has no gate."""

    def __init__(self, base, path, experts, router_width, router):
        super().__init__(base, path, router)
        down = self._linears()[-1]
        self.mov = nn.Parameter(torch.ones(experts, down.in_features, device=down.weight.device))
        self.router = new_router(experts, router_width, router, down.weight.device)

    def _linears(self):
        """Activation, gate, up (None where there is no gate), down: of the base, whose they stay."""
        base = self.base
        if hasattr(base, "down_proj"):
            return base.act_fn, base.gate_proj, base.up_proj, base.down_proj
        return base.act, getattr(base, "wi_0", None) or base.wi, getattr(base, "wi_1", None), base.wo

    def forward(self, x):
        activation, gate, up_proj, down = self._linears()
        act = activation(gate(x))
        up = up_proj(x) if up_proj is not None else torch.ones((), dtype=x.dtype, device=x.device)
        if self.router is None:
            merged = self.mov[0]
        else:
            u = {"token": act, "ffn_product": act * up, "layer_input": x}.get(self.mixing.input)
            weights = self.route(self.mixing.sentences_of(x) if u is None else u)
            merged = self.mixing.merge(weights, self.mov, "bse,ef->bsf")
        return down((act.float() * merged).to(x.dtype) * up)
