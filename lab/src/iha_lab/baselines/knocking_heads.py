"""Knocking-Heads attention."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iha.hf.attention_modules import AttentionLayer
from iha_lab.baselines.baseline import Baseline, Inputs, projection, sizes
from iha_lab.baselines.equipping import BaselineConfig


class KnockingHeadsConfig(BaselineConfig):
    """Feature maps shared by all heads before attention (Zhou et al., arXiv 2510.23052).

    `values` is the form of the values' map, `queries_keys` whether queries and keys have one too,
    which is linear. The default is the paper's KHA-MLP, its best; KHA-Linear is "linear" with
    `queries_keys`, which it found better for dense models.
    """

    kind: Literal["knocking-heads"] = "knocking-heads"
    values: Literal["mlp", "linear"] = "mlp"
    queries_keys: bool = False

    @property
    def label(self) -> str:
        parts = ["knocking-heads"]
        parts += ["linear"] if self.values == "linear" else []
        parts += ["queries-keys"] if self.queries_keys else []
        return "-".join(parts)

    def build(self, layer: AttentionLayer) -> KnockingHeads:
        found = KnockingHeads(*sizes(layer), self.values, self.queries_keys)
        for which in found.mapped:
            projection(layer, which)  # raises where there is none
        return found


class KnockingHeads(Baseline):
    """Feature maps shared by all heads, before attention (Zhou et al., arXiv 2510.23052).

    Right after the projections, before RoPE, for each head h (of queries) or g (of keys, values):

        Q̃[h] = Q[h] T_q      K̃[g] = K[g] T_k      (if `queries_keys`)
        Ṽ[g] = V[g] T_v                           (`values="linear"`)
        Ṽ[g] = 2 · (V[g] W_up ⊙ sigmoid(V[g] W_gate)) W_down      (`values="mlp"`)

    All are (d, d). W_gate starts at zero, all others as identities: plain attention. The paper's
    KHA-Linear is `values="linear"`; its KHA-MLP is `values="mlp"` without `queries_keys`.
    Forward 4·H·d FLOPs per visible pair, and 2·d² for each head and token of each map.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        values: Literal["mlp", "linear"] = "mlp",
        queries_keys: bool = True,
    ) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        self.values = values
        self.mapped = ("query", "key", "value") if queries_keys else ("value",)
        if queries_keys:
            self.t_q, self.t_k = (nn.Parameter(torch.eye(head_dim)) for _ in range(2))
        if values == "linear":
            self.t_v = nn.Parameter(torch.eye(head_dim))
        else:
            self.w_up, self.w_down = (nn.Parameter(torch.eye(head_dim)) for _ in range(2))
            self.w_gate = nn.Parameter(torch.zeros(head_dim, head_dim))

    def attach(self, layer: AttentionLayer) -> None:
        # Partial methods, not closures over this module: a copied model's hooks go with it.
        for which in self.mapped:
            projection(layer, which).register_forward_hook(functools.partial(self._hook, which))

    def _hook(self, which: str, module: object, args: object, out: Tensor) -> Tensor:
        return self.knock(out, which)

    def knock(self, out: Float[Tensor, "*B width"], which: str) -> Float[Tensor, "*B width"]:
        """Map queries, keys or values, all heads side by side as the projection gives them."""
        heads: Any = out.unflatten(-1, (-1, self.head_dim))
        if which == "query":
            heads = heads @ self.t_q
        elif which == "key":
            heads = heads @ self.t_k
        elif self.values == "linear":
            heads = heads @ self.t_v
        else:
            heads = 2 * (heads @ self.w_up * (heads @ self.w_gate).sigmoid()) @ self.w_down
        return heads.flatten(-2)

    def forward(self, inputs: Inputs) -> Float[Tensor, "B H N d"]:
        return inputs.attend()

    def flops(self, seq_len: int, causal: bool) -> int:
        heads = self.num_heads + self.num_kv_heads if "query" in self.mapped else 0
        heads += self.num_kv_heads * (3 if self.values == "mlp" else 1)
        return super().flops(seq_len, causal) + 2 * seq_len * heads * self.head_dim**2
