"""The paper's FLOP-matched mixture of window and global layers, and what it costs."""

from __future__ import annotations

import dataclasses
from typing import Any

from iha.checks import check_flag, checked_size, checked_window


def attention_flops(
    seq_len: int,
    num_heads: int,
    head_dim: int,
    pseudo_heads: int = 1,
    *,
    pseudo_queries: int | None = None,
    num_kv_heads: int | None = None,
    window: int | None = None,
    backward: bool = False,
    per_token: bool = False,
) -> int:
    """Forward FLOPs of one causal attention layer and sequence, a multiply-add counted as 2.

    With N = `seq_len`, d = `head_dim`, W = `window` in tokens and Pq = `pseudo_queries` (default
    P): attention 4·H·d·(N·Pq)·(N·P)/2, or 4·H·d·(N·Pq)·(W·P) with a window shorter than the
    sequence; mixing and collapse 2·N·d·(2H²·Pq + 2G²·P). The projections are not counted, and P = 1
    means plain attention, which mixes nothing. `backward` adds the backward pass, which is counted
    as twice the forward one, without what is computed again. `per_token` is the mean over the
    sequence, rounded down. Raises TypeError or ValueError for what is no size.
    """
    N, H = checked_size("seq_len", seq_len), checked_size("num_heads", num_heads)
    d, P = checked_size("head_dim", head_dim), checked_size("pseudo_heads", pseudo_heads)
    Pq = P if pseudo_queries is None else checked_size("pseudo_queries", pseudo_queries, at_most=P)
    G = H if num_kv_heads is None else checked_size("num_kv_heads", num_kv_heads)
    W = checked_window(window)
    pairs = N * Pq * N * P // 2
    if W is not None:
        pairs = min(pairs, N * Pq * W * P)
    mixing = 2 * N * d * (2 * H**2 * Pq + 2 * G**2 * P)
    check_flag("backward", backward)
    check_flag("per_token", per_token)
    flops = (4 * H * d * pairs + (mixing if P > 1 else 0)) * (3 if backward else 1)
    return flops // N if per_token else flops


@dataclasses.dataclass(frozen=True)
class HybridSchedule:
    """IHA layers with a window among plain global layers (arXiv 2602.21371, section 5).

    `layers` are the indices of the IHA layers, `window` is W in tokens. The other layers keep
    plain global attention: with W = N/(2·Pq·P), which is N/(2P²) in the paper, an IHA layer's
    attention costs 4·H·d·N²/2, just what a global layer costs, whatever the pattern.
    """

    num_layers: int
    seq_len: int
    pseudo_heads: int
    pseudo_queries: int
    window: int
    layers: tuple[int, ...]

    def flops(self, num_heads: int, head_dim: int, num_kv_heads: int | None = None) -> int:
        """Forward attention FLOPs of all layers, mixing and collapse included."""
        shape, Pq, G = (self.seq_len, num_heads, head_dim), self.pseudo_queries, num_kv_heads
        sizes: dict[str, Any] = {"pseudo_queries": Pq, "num_kv_heads": G, "window": self.window}
        windowed = attention_flops(*shape, self.pseudo_heads, **sizes)
        plain = self.num_layers - len(self.layers)
        return len(self.layers) * windowed + plain * attention_flops(*shape)

    def plain_flops(self, num_heads: int, head_dim: int) -> int:
        """The same of the plain model: global causal attention in every layer."""
        return self.num_layers * attention_flops(self.seq_len, num_heads, head_dim)


def hybrid_schedule(
    num_layers: int,
    seq_len: int,
    pseudo_heads: int,
    *,
    pseudo_queries: int | None = None,
    pattern: str = "SSSSL",
    last_global: bool = False,
) -> HybridSchedule:
    """The paper's schedule: every fifth layer is global and plain, W = N/(2P²) in the others.

    `pattern` is repeated over the layers, S for an IHA layer with the short window and L for a
    plain global one; `last_global` makes the last layer global whatever the pattern says there.
    nanochat's rule is `pattern="SSSL", last_global=True`.

    With fewer pseudo-queries, W = N/(2·Pq·P). Use it as `iha.upcycle(model, s.pseudo_heads,
    layers=s.layers, window=s.window, init="scratch", rope="virtual")`. Raises TypeError or
    ValueError for what is no size, and where no window is short enough.

    >>> schedule = hybrid_schedule(26, 8192, 20)
    >>> schedule.window, len(schedule.layers)
    (10, 21)
    """
    L, N = checked_size("num_layers", num_layers), checked_size("seq_len", seq_len)
    P = checked_size("pseudo_heads", pseudo_heads)
    Pq = P if pseudo_queries is None else checked_size("pseudo_queries", pseudo_queries, at_most=P)
    window = N // (2 * Pq * P)
    if window < 1:
        raise ValueError(
            f"seq_len must be at least 2·Pq·P = {2 * Pq * P} tokens for a window of one token, got"
            f" {N}; take fewer pseudo_heads or a longer sequence."
        )
    if not isinstance(pattern, str) or not pattern or {*pattern} - {*"SL"}:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"pattern must be a string of S and L, such as 'SSSL'; got {pattern!r}.")
    check_flag("last_global", last_global)
    layers = tuple(i for i in range(L - last_global) if pattern[i % len(pattern)] == "S")
    return HybridSchedule(L, N, P, Pq, window, layers)
