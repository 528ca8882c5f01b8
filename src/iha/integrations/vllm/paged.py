"""Decoding that reads the pages of a cache where they lie, by the kernel of `kernels.decode`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from iha.backends import fused
from iha.call import Call
from iha.hf.sequences import layer_options

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from iha.hf.layer_settings import LayerSettings
    from iha.hf.sequences import Decode


def paged_attention(
    mixing: Any,
    settings: LayerSettings,
    kv_cache: Float[Tensor, "blocks G block_tokens 2*d"],
    *,
    pages: Int[Tensor, "sequences most"],
    lengths: Int[Tensor, " sequences"],
    sliding_window: int | None,
    scale: float,
    softcap: float | None,
) -> Decode | None:
    """What a layer computes for sequences that decode; None where the kernel does not fit it.

    Raises ValueError where the kernel does not run on this device at all.
    """
    key, value = kv_cache.chunk(2, dim=-1)
    options, own = layer_options(settings, kv_cache.device, sliding_window)

    def call(query: Tensor) -> Call:
        tensors = (query, key, value, *mixing.parameters())
        return Call(*tensors, **options, scale=scale, softcap=softcap)

    def decode(batch: list[int], query: Tensor) -> Tensor:
        from iha.kernels import launch  # imports Triton

        return launch.run_decode(call(query), launch.Pages(pages[batch], lengths[batch]))

    example = call(key.new_empty((1, mixing.num_heads, 1, key.shape[3])))
    if unfit := fused.unfit_device(example):
        raise ValueError(f"iha_paged_kernel: {unfit()}; leave it off here.")
    # A mask is not made for pages, nor are their dimensions put in another order.
    reordered = options["phase"] is not None and settings.rotary_start
    if own is not None or reordered or fused.refusal(example):
        return None
    return decode
