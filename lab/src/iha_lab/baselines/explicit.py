"""Multi-head Explicit Attention."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from iha.hf.attention_modules import AttentionLayer
from iha_lab.baselines.baseline import Baseline, Inputs, sizes
from iha_lab.baselines.equipping import BaselineConfig

EPSILON = 1e-5  # of the norm


class ExplicitConfig(BaselineConfig):
    """Keys and values mixed over heads, outputs normed by head (Peng et al., arXiv 2601.19611)."""

    kind: Literal["mea"] = "mea"

    def build(self, layer: AttentionLayer) -> Explicit:
        return Explicit(*sizes(layer))


class Explicit(Baseline):
    """Multi-head Explicit Attention (Peng et al., arXiv 2601.19611, equations 10 to 12, 15, 17).

        K̃[f] = Σ_g K[g] W_K[g, f]      Ṽ[f] = Σ_g V[g] W_V[g, f]      (W_K and W_V are (G, G))
        O[h] = RMSNorm(A(Q[h], K̃[g(h)], Ṽ[g(h)]))

    A is plain attention; the norm is over the d dimensions of each head. Mixing commutes with RoPE,
    so the cache holds the model's keys and values. Without the norm it is IHA with P = 1 that mixes
    keys and values alone, which projections could hold; the norm is what keeps the layer from being
    plain attention. The text that was read (a copy of version 1, sections 3 to 5 and appendices)
    states neither the start of W_K and W_V nor whether the norm has weights: here identities, and
    none, as in the Differential Transformer of this package, from which the paper takes the norm.
    Its virtual heads, fewer than the model's, compress a cache and are not built.
    Forward 4·H·d FLOPs per visible pair, and 4·G²·d per token.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        self.of_keys, self.of_values = (nn.Parameter(torch.eye(num_kv_heads)) for _ in range(2))

    def forward(self, inputs: Inputs) -> Float[Tensor, "B H N d"]:
        key = torch.einsum("bgsd,gf->bfsd", inputs.key, self.of_keys)
        value = torch.einsum("bgsd,gf->bfsd", inputs.value, self.of_values)
        out = dataclasses.replace(inputs, key=key, value=value).attend()
        return rms_norm(out, out.shape[-1:], eps=EPSILON)

    def flops(self, seq_len: int, causal: bool) -> int:
        mixing = 4 * seq_len * self.num_kv_heads**2 * self.head_dim
        return super().flops(seq_len, causal) + mixing
