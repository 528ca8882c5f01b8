"""transformers' continuous batching: `model.generate_batch`, its manager, and `transformers serve`.

The manager hands the attention function its paged cache, which stores the new base keys and values
and returns those of all sequences, packed one behind the other.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching import continuous_api

from iha.hf.sequences import attend_sequences, layer_attention, reach

if TYPE_CHECKING:
    from iha.hf.sequences import Attend


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    plain: Callable[..., tuple[Tensor, Tensor | None]],
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention of one layer over all sequences of a step: query (1, H, T, d), output (1, T, H, d).

    `plain` is the attention of a layer without a mixing.
    """
    if options.get("block_table") is not None:
        raise ValueError(
            "IHA reads the pages of the cache by index, and the continuous batching config asks for"
            " block tables; set max_blocks_per_request=0."
        )
    sliding_window = options.get("sliding_window")
    scaling, softcap = options.get("scaling"), options.get("softcap")
    base = {"key_states": key, "value_states": value, "layer_idx": module.layer_idx}
    if "kwargs" in inspect.signature(cache.update).parameters:
        key, value = cache.update(**base, kwargs=options)
    else:  # up to transformers 5.16, which gives (tokens, heads, head dimension)
        indices = {name: options[name] for name in ("read_index", "write_index")}
        key, value = (t.transpose(0, 1)[None] for t in cache.update(**base, **indices))
    starts = options["cu_seq_lens_k"]
    if isinstance(starts, dict):
        starts = starts["full_attention" if sliding_window is None else "sliding_attention"]
    counts, lengths = (bounds.diff().tolist() for bounds in (options["cu_seq_lens_q"], starts))

    def fetch(batch: list[int], positions: Tensor) -> tuple[Tensor, Tensor]:
        rows = starts[batch][:, None] + positions
        return key[0][:, rows].transpose(0, 1), value[0][:, rows].transpose(0, 1)

    if getattr(module, "head_mixing", None) is None:
        seen = None if sliding_window is None else sliding_window - 1
        attend = _plain_attention(module, plain, sliding_window, scaling, softcap)
    else:
        seen = reach(module.iha, sliding_window)
        attend = layer_attention(
            module.head_mixing,
            module.iha,
            device=query.device,
            sliding_window=sliding_window,
            scale=scaling,
            softcap=softcap,
        )
    rows = query[0].transpose(0, 1)
    return attend_sequences(rows, counts, lengths, fetch, attend, reach=seen)[None], None


def _plain_attention(
    module: nn.Module,
    plain: Callable[..., tuple[Tensor, Tensor | None]],
    sliding_window: int | None,
    scaling: float | None,
    softcap: float | None,
) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        N, S = query.shape[2], key.shape[2]
        n = torch.arange(S - N, S, device=query.device)[:, None]
        distance = n - torch.arange(S, device=query.device)
        visible = distance >= 0
        if sliding_window is not None:
            visible &= distance < sliding_window
        visible = visible[None, None] if mask is None else visible & mask
        output, _ = plain(
            module, query, key, value, visible, None, scaling=scaling, softcap=softcap
        )
        return output.transpose(1, 2)

    return attend


def keep(name: str) -> None:
    """Let the manager keep the attention function `name`.

    It knows sdpa, eager and FlashAttention, refuses others, and on a GPU switches to
    FlashAttention, which would leave the mixing out. It has no hook, hence this patch.
    """
    manager = continuous_api.ContinuousBatchingManager
    switch: Any = getattr(manager, "switch_to_cb_friendly_attn", None)
    if switch is None or getattr(switch, "keeps_iha", False):
        return

    @functools.wraps(switch)
    def switch_to_cb_friendly_attn(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if model.config._attn_implementation != name:
            switch(self, model, *args, **kwargs)

    switch_to_cb_friendly_attn.keeps_iha = True  # type: ignore[attr-defined]
    manager.switch_to_cb_friendly_attn = switch_to_cb_friendly_attn
