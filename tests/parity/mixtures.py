"""The mixtures of moesaic.hf with weights that make a difference, and one sequence at a time, without padding."""

import pathlib
import sys

import torch

import common

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "python"))
from moesaic import hf  # noqa: E402
from moesaic.hf.mixture import DOWNS, Settings  # noqa: E402
from moesaic.hf.modules import Router  # noqa: E402


class Mixture(hf.Mixture):
    def __init__(self, model, method, experts=3, rank=2, alpha=None, targets=None, k_site="auto", seed=1, input_targets=DOWNS,
                 form="plain", **router):
        """experts: of every layer, or a list by layer; input_targets: MoV's targets that scale their input."""
        alpha = alpha or (1.0 if model.config.is_encoder_decoder else 3.0)  # scores of T5 are not divided by sqrt(k)
        experts = dict(enumerate(experts)) if isinstance(experts, list) else experts
        self.mixing = Router(**router)
        self.mixing.keeps = True
        super().__init__(model, Settings(method, experts, targets, None, input_targets, rank, alpha, k_site=k_site,
                                         router=self.mixing), form)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                drawn = torch.randn(parameter.shape, generator=generator)
                if ".mov." in name:
                    parameter.copy_(1 + 0.3 * drawn)
                else:  # A [E, r, in], B [E, out, r], router [E, d_u]: what they read is their last dimension
                    parameter.copy_(drawn / parameter.shape[-1]**0.5)

    def logits(self, ids, sentence=None):
        """[N, V]; sentence: [B, d_e]."""
        rows = []
        for b, s in enumerate(ids):
            hf.sentences(self.model, None if sentence is None else sentence[b])
            rows.append(common.reference_logits(self.model, [s]))
        return torch.cat(rows)

    def gradients(self):
        return {name: p.grad for name, p in self.parameters.items()}
