"""Which (query, key) pairs may see each other: the twin of `iha.kernels.visibility`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iha.call import Call, Causality

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


def visible_pairs(
    n: Int[Tensor, "*#shape"],
    p: Int[Tensor, "*#shape"],
    s: Int[Tensor, "*#shape"],
    q: Int[Tensor, "*#shape"],
    *,
    causal: Causality | None,
    window: int | None,
    pseudo_heads: int,
) -> Bool[Tensor, "*shape"]:
    """Whether pseudo-query (n, p) sees pseudo-key (s, q), by position alone.

    | `causal`  | without window        | with `window` = W                       |
    |-----------|-----------------------|-----------------------------------------|
    | `"flat"`  | s·P + q ≤ n·P + p     | and (n·P + p) - (s·P + q) < W·P         |
    | `"token"` | s ≤ n                 | and n - s < W                           |
    | `None`    | all                   | abs(n - s) < W                          |

    Positions are integer tensors that broadcast against each other.
    """
    if causal == "flat":
        distance = (n - s) * pseudo_heads + (p - q)
        reach = None if window is None else window * pseudo_heads
    else:
        distance = (n - s) + 0 * (p - q)
        reach = window
    if causal is not None:
        visible = distance >= 0
        return visible if reach is None else visible & (distance < reach)
    if reach is None:
        return torch.ones_like(distance, dtype=torch.bool)
    return distance.abs() < reach


def tokens_behind(window: int, causal: Causality | None) -> int:
    """How many tokens before its own a query token sees through a window of W tokens."""
    # Under flat causality the token W back is still seen in part, by the lower pseudo-queries.
    return window if causal == "flat" else window - 1


def window_from_flash(window_size: tuple[int | None, int | None]) -> int | None:
    """W = left + 1 of FlashAttention's `window_size` (left, 0), which does not count the own token.

    (left, left) is that to both sides, without causality; -1 and None are no window, W = None.
    """
    left, right = (-1 if size is None else size for size in window_size)
    if right not in (0, left) or left < -1:
        raise ValueError(
            f"window_size must be (left, 0), (left, left) or (-1, -1); got {window_size}."
        )
    return None if left == -1 else left + 1


def reach(call: Call) -> tuple[int, int]:
    """How many tokens a query token of a window sees behind itself, and how many ahead."""
    assert call.window is not None
    ahead = call.window - 1 if call.causal is None else 0
    return tokens_behind(call.window, call.causal), ahead


def token_mask(call: Call) -> Bool[Tensor, "#B #H N S"] | None:
    """`attn_mask` and `document_ids` together, on token level; None where neither is given."""
    mask = call.attn_mask
    if mask is not None:
        mask = mask.expand(-1, -1, call.query.shape[2], call.key.shape[2])
    if call.document_ids is not None:
        ids = call.document_ids
        of_query = ids.index_select(1, call.query_positions())
        same = (of_query[:, :, None] == ids[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return mask


def virtual_mask(call: Call) -> Bool[Tensor, "#B #H N Pq S P"] | None:
    """Everything that limits visibility, for every pseudo pair; None where all is visible.

    Dense: (N·P)·(S·P) entries. `local` and `flash` never ask for it.
    """
    P = call.pseudo_heads
    tokens = token_mask(call)
    pairs = None
    if call.causal is not None or call.window is not None:
        pairs = visible_pairs(
            call.query_positions()[:, None, None, None],
            call.query_indices()[:, None, None],
            call.key_positions()[:, None],
            torch.arange(P, device=call.query.device),
            causal=call.causal,
            window=call.window,
            pseudo_heads=P,
        )
    if tokens is None:
        return None if pairs is None else pairs[None, None]
    tokens = tokens[:, :, :, None, :, None]
    shape = (*tokens.shape[:3], call.pseudo_queries, -1, P)
    return tokens.expand(shape) if pairs is None else tokens & pairs
