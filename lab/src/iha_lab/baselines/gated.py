"""Gated attention."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from iha.hf.attention_modules import AttentionLayer
from iha_lab.baselines.baseline import (
    Inputs,
    StateReading,
    fresh,
    initializer,
    projection,
    sizes,
)
from iha_lab.baselines.equipping import BaselineConfig


class GatedConfig(BaselineConfig):
    """A sigmoid gate on each head's output (Qiu et al., arXiv 2505.06708).

    `gate` has a value for each head and dimension ("elementwise") or for each head ("headwise").
    """

    kind: Literal["gated"] = "gated"
    gate: Literal["elementwise", "headwise"] = "elementwise"

    @property
    def label(self) -> str:
        return self.kind if self.gate == "elementwise" else f"{self.kind}-{self.gate}"

    def build(self, layer: AttentionLayer) -> Gated:
        E, std = projection(layer, "query").in_features, initializer(layer)
        return Gated(*sizes(layer), E, self.gate == "headwise", std)


class Gated(StateReading):
    """A sigmoid gate on each head's output (Qiu et al., arXiv 2505.06708, position G1).

        O'[h, n] = O[h, n] ⊙ sigmoid(X[n] W_θ[h])

    X are the states that the query projection reads, behind the layer's norm. W_θ[h] is (E, d), or
    (E, 1) where the gate is headwise, has no bias and starts as the model's projections do, so the
    layer starts near half of plain attention. The authors' code makes it a part of the query
    projection; the same numbers here are a projection of their own.
    Forward 4·H·d FLOPs per visible pair, and 2·E·H·d (or 2·E·H) per token.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        in_features: int,
        headwise: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        self.gate = fresh(in_features, num_heads * (1 if headwise else head_dim), std=std)

    def forward(self, inputs: Inputs) -> Float[Tensor, "B H N d"]:
        gate = self.gate(self.states()).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return inputs.attend() * gate.sigmoid()
