"""Knocking-Heads attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from iha_lab.baselines.layers import projection
from iha_lab.baselines.rival import Rival, attend, plain_flops

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from iha.hf.attention_modules import AttentionLayer


class KnockingHeads(Rival):
    """Feature maps shared by all heads, before attention (Zhou et al., arXiv 2510.23052).

    Right after the projections, before RoPE, for each head h (of queries) or g (of keys, values):

        Q̃[h] = Q[h] T_q      K̃[g] = K[g] T_k      (if `queries_keys`)
        Ṽ[g] = V[g] T_v                           (`values="linear"`)
        Ṽ[g] = 2 · (V[g] W_up ⊙ sigmoid(V[g] W_gate)) W_down      (`values="mlp"`)

    All are (d, d). W_gate starts at zero, all others as identities: plain attention. The paper's
    KHA-Linear is `values="linear"`; its KHA-MLP is `values="mlp"` without `queries_keys`.
    Forward 4·H·d FLOPs a visible pair, and 2·d² for each head and token of each map.
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
        self.values, self.queries_keys = values, queries_keys
        if queries_keys:
            self.t_q, self.t_k = (nn.Parameter(torch.eye(head_dim)) for _ in range(2))
        if values == "linear":
            self.t_v = nn.Parameter(torch.eye(head_dim))
        else:
            self.w_up, self.w_down = (nn.Parameter(torch.eye(head_dim)) for _ in range(2))
            self.w_gate = nn.Parameter(torch.zeros(head_dim, head_dim))

    def attach(self, layer: AttentionLayer) -> None:
        if self.queries_keys:
            projection(layer, "query").register_forward_hook(self._knock_queries)
            projection(layer, "key").register_forward_hook(self._knock_keys)
        projection(layer, "value").register_forward_hook(self._knock_values)

    def _knock_queries(self, module: object, args: object, out: Tensor) -> Tensor:
        return self._of_heads(out, "query")

    def _knock_keys(self, module: object, args: object, out: Tensor) -> Tensor:
        return self._of_heads(out, "key")

    def _knock_values(self, module: object, args: object, out: Tensor) -> Tensor:
        return self._of_heads(out, "value")

    def _of_heads(self, out: Float[Tensor, "B N Hd"], which: str) -> Float[Tensor, "B N Hd"]:
        heads = out.unflatten(-1, (-1, self.head_dim))
        return self.knock(heads, which).flatten(-2)

    def knock(self, heads: Float[Tensor, "... d"], which: str) -> Float[Tensor, "... d"]:
        """The map of queries, keys or values."""
        if which == "query":
            return heads @ self.t_q
        if which == "key":
            return heads @ self.t_k
        if self.values == "linear":
            return heads @ self.t_v
        return 2 * (heads @ self.w_up * (heads @ self.w_gate).sigmoid()) @ self.w_down

    def forward(
        self,
        query: Float[Tensor, "B H N d"],
        key: Float[Tensor, "B G S d"],
        value: Float[Tensor, "B G S d"],
        *,
        visible: Bool[Tensor, "B 1 N S"] | None,
        causal: bool,
        scale: float,
        offset: Any = None,
    ) -> Float[Tensor, "B H N d"]:
        return attend(query, key, value, visible, causal, scale)

    def flops(self, seq_len: int, causal: bool) -> int:
        heads = self.num_heads + self.num_kv_heads if self.queries_keys else 0
        heads += self.num_kv_heads * (3 if self.values == "mlp" else 1)
        mapping = 2 * seq_len * heads * self.head_dim**2
        return plain_flops(seq_len, self.num_heads, self.head_dim, causal) + mapping
