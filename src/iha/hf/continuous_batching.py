"""transformers' continuous batching: `model.generate_batch`, its manager, and `transformers serve`.

The manager hands the attention function its paged cache, which stores the new base keys and values
and returns those of all sequences, packed one behind the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.generation.continuous_batching import continuous_api

from iha.hf.sequences import attend_sequences

if TYPE_CHECKING:
    from iha.hf.sequences import Attend


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    kwargs: dict[str, Any],
    layer: Callable[[], tuple[Attend, int | None]],
) -> Tensor:
    """Attention of one layer over all sequences of a step, (1, T, H, d).

    `layer` gives the layer's attention and its reach, as `attend_sequences` takes them.
    """
    if kwargs.get("block_table") is not None:
        raise ValueError(
            "IHA reads the pages of the cache by index, and the continuous batching config asks for"
            " block tables; set max_blocks_per_request=0."
        )
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
    )
    counts, lengths = (kwargs[f"cu_seq_lens_{name}"].diff().tolist() for name in "qk")
    first = kwargs["cu_seq_lens_k"]

    def fetch(batch: list[int], positions: Tensor) -> tuple[Tensor, Tensor]:
        rows = first[batch][:, None] + positions
        return key[0][:, rows].transpose(0, 1), value[0][:, rows].transpose(0, 1)

    attend, reach = layer()
    rows = query[0].transpose(0, 1)
    return attend_sequences(rows, counts, lengths, fetch, attend, reach=reach)[None]


def keep_iha(name: str) -> None:
    """Let the manager keep the attention function `name`.

    It knows sdpa, eager and FlashAttention, refuses others, and on a GPU switches to
    FlashAttention, which would leave the mixing out. It has no hook, hence this patch.
    """
    manager = continuous_api.ContinuousBatchingManager
    switch = manager.switch_to_cb_friendly_attn
    if getattr(switch, "keeps_iha", False):
        return

    @functools.wraps(switch)
    def switch_to_cb_friendly_attn(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if model.config._attn_implementation != name:
            switch(self, model, *args, **kwargs)

    switch_to_cb_friendly_attn.keeps_iha = True  # type: ignore[attr-defined]
    manager.switch_to_cb_friendly_attn = switch_to_cb_friendly_attn
