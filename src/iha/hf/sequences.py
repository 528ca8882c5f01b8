"""A layer's attention over many sequences of different lengths, as serving engines batch them.

A step of continuous batching packs the queries of all its sequences into one row of tokens, while
the keys of each lie in pages of a cache. Sequences that decode are attended together: they are
aligned at their last token, so that one call of the operator with one query offset serves all, and
a mask hides what stands before the first token of the shorter ones. Sequences that bring many
queries (a prompt, or a chunk of one) are attended one by one, without a mask.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iha.visibility import tokens_behind

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from iha.hf.layer_settings import LayerSettings

    # (which sequences, positions in them) -> their keys and values
    Fetch = Callable[
        [list[int], Int[Tensor, "b S"]],
        tuple[Float[Tensor, "b G S d"], Float[Tensor, "b G S d"]],
    ]
    # (query, key, value, mask) -> output, with the queries last among the keys
    Attend = Callable[
        [
            Float[Tensor, "b H N d"],
            Float[Tensor, "b G S d"],
            Float[Tensor, "b G S d"],
            "Bool[Tensor, 'b 1 1 S'] | None",
        ],
        Float[Tensor, "b H N d"],
    ]
    # (which sequences, query) -> output, of sequences that decode
    Decode = Callable[[list[int], Float[Tensor, "b H N d"]], Float[Tensor, "b H N d"]]

MOST_DECODED = 8  # queries of a sequence that decodes, speculation included


def reach(settings: LayerSettings, sliding_window: int | None) -> int | None:
    """How many tokens before a query's own a layer sees, or None for all.

    A flat window of W tokens reaches in part into the token W before; a token window does not, nor
    does the model's own `sliding_window`.
    """
    reaches = [None if sliding_window is None else sliding_window - 1]
    if settings.window is not None:
        reaches.append(tokens_behind(settings.window, settings.causal))
    return min((found for found in reaches if found is not None), default=None)


def layer_options(
    settings: LayerSettings, device: torch.device, sliding_window: int | None
) -> tuple[dict[str, Any], int | None]:
    """A layer's arguments of the operator, and the model's own window where it has to be a mask.

    It has to on top of flat causality: a flat window of the same size would let part of one token
    more through.
    """
    options: dict[str, Any] = {
        "causal": settings.causal,
        "window": settings.window,
        "phase": settings.phase(device),
        "rotary": settings.rotary,
    }
    if settings.causal == "flat" or sliding_window is None:
        return options, sliding_window
    return options | {"window": min(sliding_window, settings.window or sliding_window)}, None


def layer_attention(
    mixing: Any,
    settings: LayerSettings,
    *,
    device: torch.device,
    sliding_window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Attend:
    """What a decoder's layer computes, with the queries last among the keys."""
    options, sliding_window = layer_options(settings, device, sliding_window)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query, key = settings.aligned(query, key)
        N, S = query.shape[2], key.shape[2]
        if sliding_window is not None and sliding_window < S:
            n = torch.arange(S - N, S, device=device)[:, None]
            near = (n - torch.arange(S, device=device) < sliding_window)[None, None]
            mask = near if mask is None else mask & near
        return mixing(
            query,
            key,
            value,
            attn_mask=mask,
            **options,
            scale=scale,
            softcap=softcap,
            backend=settings.backend,
        )

    return attend


def attend_sequences(
    query: Float[Tensor, "T H d"],
    counts: Sequence[int],
    lengths: Sequence[int],
    fetch: Fetch,
    attend: Attend,
    *,
    reach: int | None = None,
    decode: Decode | None = None,
) -> Float[Tensor, "T H d"]:
    """The output for each row of `query`; rows of no sequence (padding at the end) give zeros.

    Args:
        query: the queries of all sequences, one sequence behind the other.
        counts: how many queries each sequence has; 0 is allowed.
        lengths: how many tokens each has in the cache, its queries' own included.
        fetch: reads keys and values from the cache, by sequence and position.
        attend: the layer's attention.
        reach: how many tokens before the oldest query are visible at all, or None for all. Older
            ones are never fetched: an engine may have given their pages away.
        decode: attends sequences of up to `MOST_DECODED` queries, in place of `fetch` and
            `attend`. Their `lengths` are not read then.
    """
    output = torch.zeros_like(query)
    starts = [0, *accumulate(counts)]

    def seen(i: int) -> int:
        if decode is not None and counts[i] <= MOST_DECODED:
            return 0
        return lengths[i] if reach is None else min(lengths[i], counts[i] + reach)

    for batch in _batches(counts, [seen(i) for i in range(len(counts))]):
        N, S = counts[batch[0]], max(map(seen, batch))

        def column(numbers: list[int]) -> Int[Tensor, "b 1"]:
            return torch.tensor(numbers, device=query.device)[:, None]

        rows = column([starts[i] for i in batch]) + torch.arange(N, device=query.device)
        if decode is not None and N <= MOST_DECODED:
            output[rows] = decode(batch, query[rows].transpose(1, 2)).transpose(1, 2)
            continue
        ends = column([lengths[i] for i in batch])
        oldest = column([lengths[i] - seen(i) for i in batch])
        positions = ends - S + torch.arange(S, device=query.device)
        mask = None
        if any(seen(i) < S for i in batch):
            mask = (positions >= oldest)[:, None, None]
        key, value = fetch(batch, positions.maximum(oldest))
        output[rows] = attend(query[rows].transpose(1, 2), key, value, mask).transpose(1, 2)
    return output


def _batches(counts: Sequence[int], seen: Sequence[int]) -> list[list[int]]:
    """Sequences that are attended together: equally many queries, lengths within a factor of 2."""
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, count in enumerate(counts):
        if 0 < count <= MOST_DECODED:
            alike[count, seen[i].bit_length()].append(i)
        elif count:
            alike[count, seen[i], i].append(i)
    return list(alike.values())
