"""What a rival is: the attention of one layer, in place of the model's own."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import iha

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from iha.hf.attention_modules import AttentionLayer


class Rival(nn.Module, abc.ABC):
    """One layer's attention and its extra parameters.

    H query heads, G key/value heads (G divides H), d head dimension, as everywhere in `iha`.
    Tensors are those that transformers hands to an attention function: after RoPE and the cache.
    What a rival does before that, it does in hooks that `attach` puts on the layer's projections.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim

    def attach(self, layer: AttentionLayer) -> None:
        """Hook into the layer's projections. Most rivals need none."""
        del layer

    @abc.abstractmethod
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
        """Attend. A query that sees nothing gives zeros.

        visible: True = may attend, broadcastable to (B, H, N, S); causality is in it already.
            None: everything is visible, or s ≤ n where `causal`.
        causal: whether the layer is.
        offset: which of the S positions is the first query's own, an int or a tensor; None: the
            queries are the last N. With a preallocated cache they are not.
        """

    @abc.abstractmethod
    def flops(self, seq_len: int, causal: bool) -> int:
        """Forward FLOPs of the definition for one sequence, a multiply-add counted as 2.

        Without the projections (`nn.Linear`), which `cost` counts by their weights.
        """


def attend(
    query: Float[Tensor, "B H N d"],
    key: Float[Tensor, "B G S d"],
    value: Float[Tensor, "B G S d"],
    visible: Bool[Tensor, "B 1 N S"] | None,
    causal: bool,
    scale: float,
) -> Float[Tensor, "B H N d"]:
    """Plain attention; the arguments are those of `Rival.forward`."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    # transformers leaves the mask out only where the cache was empty before: s ≤ n from the first.
    triangle = visible is None and causal and query.shape[2] > 1
    out = scaled_dot_product_attention(query, key, value, visible, is_causal=triangle, scale=scale)
    if visible is not None:  # not every kernel gives zeros where nothing is visible
        out = out.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return out


def seen(N: int, S: int, causal: bool, device: torch.device) -> Bool[Tensor, "N S"]:
    """What is visible where there is no mask, written out as one."""
    everything = torch.ones(N, S, dtype=torch.bool, device=device)
    return everything.tril() if causal and N > 1 else everything


def softmax(logits: Float[Tensor, "*R S"], visible: Bool[Tensor, "*R S"]) -> Float[Tensor, "*R S"]:
    """Over the last dimension, in float32 at least; zeros where nothing is visible."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    return logits.softmax(-1, dtype=wide).masked_fill(~visible, 0.0).to(logits.dtype)


def pairs(seq_len: int, causal: bool, window: int | None = None) -> int:
    """How many (query, key) pairs are visible: N²/2 if causal, else N².

    A window of W tokens leaves W keys a query if causal, else 2W − 1.
    """
    N = seq_len
    every = N**2 // 2 if causal else N**2
    if window is None:
        return every
    return min(every, N * window if causal else N * (2 * window - 1))


def plain_flops(
    seq_len: int, num_heads: int, head_dim: int, causal: bool, window: int | None = None
) -> int:
    """4·H·d for each visible pair: a layer of plain attention."""
    if causal:
        return iha.attention_flops(seq_len, num_heads, head_dim, window=window)
    return 4 * num_heads * head_dim * pairs(seq_len, causal, window)
