"""Differential attention, version 2."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from iha.hf.attention_modules import AttentionLayer
from iha_lab.baselines.baseline import (
    Inputs,
    StateReading,
    biased,
    fresh,
    head_dim,
    initializer,
    plain_flops,
    projection,
    sizes,
)
from iha_lab.baselines.equipping import BaselineConfig


class DifferentialV2Config(BaselineConfig):
    """Differential attention with twice the queries (Ye et al., unilm, January 2026)."""

    kind: Literal["differential-v2"] = "differential-v2"

    def build(self, layer: AttentionLayer) -> DifferentialV2:
        like = projection(layer, "query")
        norm: Any = getattr(layer.module, "q_norm", None)
        if norm is not None and norm.weight.numel() == like.out_features > head_dim(layer):
            raise ValueError(
                f"layer {layer.name!r} ({type(layer.module).__name__}) norms all query heads"
                " together, and differential attention V2 has twice as many; take a model that"
                " norms each head, or none."
            )
        return DifferentialV2(*sizes(layer), like.in_features, biased(like), initializer(layer))


class DifferentialV2(StateReading):
    """The difference of two heads that share keys and values (Ye et al., January 2026).

    "Differential Transformer V2", microsoft/unilm, Diff-Transformer/Diff-Transformer-V2; its
    authors describe it in a post and in code, not in a paper.

        O[h, n] = A(Q[h], K[g], V[g])[n] − sigmoid(X[n] · W_λ[h]) · A(Q'[h], K[g], V[g])[n]

    A is plain attention, g = g(h), and X are the states that the query projection reads. Q' are
    another H query heads: 2H in all, beside each other in pairs as in the authors' code, and turned
    by RoPE as the model's own. Unlike version 1 the heads keep their number and width, λ is one
    value for each token and head, and there is neither a norm nor a factor 1 − λ_init. So it has
    more parameters than the model: E·H·d for Q' and E·H for λ, which start as its projections do.
    Forward 8·H·d FLOPs per visible pair, twice plain attention's.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        in_features: int,
        projection_bias: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        self.query = fresh(in_features, num_heads * head_dim, projection_bias, std)
        self.balance = fresh(in_features, num_heads, std=std)

    def see(self, module: object, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        out = super().see(module, args, out)
        # transformers counts heads by the projection's width.
        heads = [t.unflatten(-1, (self.num_heads, -1)) for t in (out, self.query(args[0]))]
        return torch.stack(heads, -2).flatten(-3)

    def forward(self, inputs: Inputs) -> Float[Tensor, "B H N d"]:
        balance = self.balance(self.states()).sigmoid().transpose(1, 2)[..., None]
        if inputs.query.shape[1] != 2 * self.num_heads:
            raise ValueError(
                f"the model splits its queries into {inputs.query.shape[1]} heads, whatever their"
                f" projection gives; differential attention V2 needs {2 * self.num_heads} from"
                " there, so take a model of Llama's or BERT's kind."
            )
        out = inputs.attend()
        return out[:, 0::2] - balance * out[:, 1::2]

    def flops(self, seq_len: int, causal: bool) -> int:
        return plain_flops(seq_len, 2 * self.num_heads, self.head_dim, causal)
