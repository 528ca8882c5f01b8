"""A baseline is the attention of one layer, in place of the model's own."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import iha
from iha.hf.attention_modules import AttentionLayer

# Names of the projections: Llama's and its kin's, BERT's and its kin's.
PROJECTIONS = {
    "query": ("q_proj", "query"),
    "key": ("k_proj", "key"),
    "value": ("v_proj", "value"),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What transformers hands to an attention function: tensors after RoPE and the cache.

    H query heads, G key/value heads (G divides H), d head dimension, as everywhere in `iha`.

    Attributes:
        visible: True = may attend; causality is in it already. None: everything is visible, or
            s ≤ n where `causal`.
        causal: whether the layer is.
        offset: which of the S positions is the first query's own, an int or a tensor. None: the
            queries are the last N; with a preallocated cache they are not.
    """

    query: Float[Tensor, "B H N d"]
    key: Float[Tensor, "B G S d"]
    value: Float[Tensor, "B G S d"]
    visible: Bool[Tensor, "#B #H #N S"] | None
    causal: bool
    scale: float
    offset: Any = None

    def repeated(self) -> tuple[Float[Tensor, "B H S d"], Float[Tensor, "B H S d"]]:
        """Repeat keys and values, so that each query head has its own."""
        copies = self.query.shape[1] // self.key.shape[1]
        return self.key.repeat_interleave(copies, 1), self.value.repeat_interleave(copies, 1)

    def mask(self) -> Bool[Tensor, "b h n S"]:
        """Write `visible` out where it is None; broadcastable to (B, H, N, S)."""
        if self.visible is not None:
            return self.visible
        N, S = self.query.shape[2], self.key.shape[2]
        everything = torch.ones(1, 1, N, S, dtype=torch.bool, device=self.query.device)
        return everything.tril() if self.causal and N > 1 else everything

    def attend(self) -> Float[Tensor, "B H N d"]:
        """Plain attention."""
        key, value = self.repeated()
        # transformers leaves the mask out only where the cache was empty before: s ≤ n holds.
        triangle = self.visible is None and self.causal and self.query.shape[2] > 1
        out = scaled_dot_product_attention(
            self.query, key, value, self.visible, is_causal=triangle, scale=self.scale
        )
        if self.visible is None:
            return out
        # Not every kernel gives zeros where nothing is visible.
        return out.masked_fill(~self.visible.any(-1, keepdim=True), 0.0)


class Baseline(nn.Module, abc.ABC):
    """One layer's attention and its extra parameters.

    What a baseline does before RoPE, it does in hooks that `attach` puts on the layer's
    projections.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim

    def attach(self, layer: AttentionLayer) -> None:
        """Hook into the layer's projections. Most baselines need none."""
        del layer

    @abc.abstractmethod
    def forward(self, inputs: Inputs) -> Float[Tensor, "B H N d"]:
        """Attend. A query that sees nothing gives zeros."""

    def flops(self, seq_len: int, causal: bool) -> int:
        """Count forward FLOPs of the definition for one sequence, a multiply-add as 2.

        The projections (`nn.Linear`) are left out; `cost` counts them by their weights.
        """
        return plain_flops(seq_len, self.num_heads, self.head_dim, causal)


class StateReading(Baseline):
    """A baseline that also reads the states that the layer's query projection reads."""

    _states: Tensor | None = None

    def attach(self, layer: AttentionLayer) -> None:
        projection(layer, "query").register_forward_hook(self.see)

    def see(self, module: object, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Keep what the projection was given; return what it is to give."""
        self._states = args[0]
        return out

    def states(self) -> Float[Tensor, "B N E"]:
        """Return the states of the query tokens, once."""
        states, self._states = self._states, None
        assert states is not None  # the layer projects before it attends
        return states


def fresh(in_features: int, out_features: int, bias: bool = False, std: float = 0.02) -> nn.Linear:
    """Make a projection that starts as a model's own do: normal weights, a bias of zeros."""
    linear = nn.Linear(in_features, out_features, bias)
    nn.init.normal_(linear.weight, std=std)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def biased(linear: nn.Linear) -> bool:
    return "bias" in dict(linear.named_parameters())


def refuse_a_cache(inputs: Inputs, name: str, uncached: str) -> None:
    """Raise ValueError where the queries are not all of the sequence."""
    N, S = inputs.query.shape[2], inputs.key.shape[2]
    if N != S:
        raise ValueError(
            f"{name} keeps no cache of {uncached}, and was given {N} queries for {S} keys; call the"
            " model with use_cache=False."
        )


def softmax(logits: Float[Tensor, "*R S"], visible: Bool[Tensor, "*#R S"]) -> Float[Tensor, "*R S"]:
    """Normalize the last dimension, in float32 at least; zeros where nothing is visible."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    return logits.softmax(-1, dtype=wide).masked_fill(~visible, 0.0).to(logits.dtype)


def pairs(seq_len: int, causal: bool, window: int | None = None) -> int:
    """Count the visible (query, key) pairs: N²/2 if causal, else N².

    A window of W tokens leaves W keys per query if causal, else 2W − 1.
    """
    N = seq_len
    every = N**2 // 2 if causal else N**2
    if window is None:
        return every
    return min(every, N * window if causal else N * (2 * window - 1))


def plain_flops(
    seq_len: int, num_heads: int, head_dim: int, causal: bool, window: int | None = None
) -> int:
    """Count the FLOPs of a layer of plain attention: 4·H·d for each visible pair."""
    if causal:
        return iha.attention_flops(seq_len, num_heads, head_dim, window=window)
    return 4 * num_heads * head_dim * pairs(seq_len, causal, window)


def sizes(layer: AttentionLayer) -> tuple[int, int, int]:
    """Return (H, G, d) of a layer."""
    return layer.num_heads, layer.num_kv_heads, head_dim(layer)


def head_dim(layer: AttentionLayer) -> int:
    module: Any = layer.module
    for holder in (module, module.config):
        for name in ("head_dim", "attention_head_size"):
            if isinstance(size := getattr(holder, name, None), int):
                return size
    return module.config.hidden_size // layer.num_heads


def initializer(layer: AttentionLayer) -> float:
    """Return the standard deviation with which the model's projections start."""
    module: Any = layer.module
    return getattr(module.config, "initializer_range", 0.02)


def projection(layer: AttentionLayer, which: str) -> nn.Linear:
    """Return the layer's own projection to queries, keys or values.

    Raises:
        ValueError: the layer has none of its own: its projections are one matrix, or have another
            shape.
    """
    heads = layer.num_heads if which == "query" else layer.num_kv_heads
    for name in PROJECTIONS[which]:
        found = getattr(layer.module, name, None)
        if isinstance(found, nn.Linear) and found.out_features == heads * head_dim(layer):
            return found
    raise ValueError(
        f"layer {layer.name!r} ({type(layer.module).__name__}) has no {which} projection of its own"
        f" ({' or '.join(PROJECTIONS[which])}), which this baseline works on; use a model of"
        " Llama's or BERT's kind."
    )
