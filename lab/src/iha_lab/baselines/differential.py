"""Differential attention."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from iha.hf.attention_modules import AttentionLayer
from iha_lab.baselines.baseline import Baseline, Inputs, sizes
from iha_lab.baselines.equipping import BaselineConfig

EPSILON = 1e-5  # of the norm


class DifferentialConfig(BaselineConfig):
    """The difference of two softmax maps (Ye et al., arXiv 2410.05258)."""

    kind: Literal["differential"] = "differential"

    def build(self, layer: AttentionLayer) -> Differential:
        return Differential(*sizes(layer), layer.index or 0)


class Differential(Baseline):
    """The difference of two softmax maps (Ye et al., arXiv 2410.05258).

    H heads of the model make H/2 of the paper's, whose values are twice as wide. Head j takes the
    model's heads j and j + H/2, as in transformers' DiffLlama, and V_j is both values side by side:

        O_j = (1 − λ_init) · RMSNorm((softmax(Q_j K_jᵀ) − λ · softmax(Q_{j+H/2} K_{j+H/2}ᵀ)) V_j)
        λ = exp(λ_q1 · λ_k1) − exp(λ_q2 · λ_k2) + λ_init,   λ_init = 0.8 − 0.6·exp(−0.3·layer)

    Layers count from 0; the four λ vectors, (d,), start normal with deviation 0.1; the norm has no
    weights. So it is never plain attention.
    Forward 4·H·d FLOPs per visible pair, as plain attention: the maps' difference times the values.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, layer_index: int = 0
    ) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        for name, heads in (("query", num_heads), ("key/value", num_kv_heads)):
            if heads % 2:
                raise ValueError(
                    f"differential attention takes {name} heads in pairs, and the model has"
                    f" {heads}; give it an even number."
                )
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer_index)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(0.1 * torch.randn(head_dim)) for _ in range(4)
        )

    def weight(self) -> Float[Tensor, ""]:
        """λ."""
        first = (self.lambda_q1 * self.lambda_k1).sum(dtype=torch.float32).exp()
        second = (self.lambda_q2 * self.lambda_k2).sum(dtype=torch.float32).exp()
        return first - second + self.lambda_init

    def forward(self, inputs: Inputs) -> Float[Tensor, "B H N d"]:
        # Both maps times each half of the values, by SDPA, whose fused kernels want values of the
        # keys' width and return no maps.
        halves = (
            dataclasses.replace(inputs, value=half.repeat(1, 2, 1, 1)).attend()
            for half in inputs.value.chunk(2, dim=1)
        )
        first, second = torch.cat(list(halves), -1).chunk(2, dim=1)
        out = first - self.weight().to(first.dtype) * second
        out = (1 - self.lambda_init) * rms_norm(out, out.shape[-1:], eps=EPSILON)
        # (B, H/2, N, 2d): transformers concatenates heads of width d.
        return out.unflatten(-1, (2, self.head_dim)).transpose(2, 3).flatten(1, 2)
