"""IHA over vLLM's paged cache of base keys and values.

The cache holds what a plain model's would, since the mixing is applied after it. So vLLM's block
tables, prefix caching and chunked prefill are untouched, and only `forward` differs: it gathers the
pages that a layer sees and calls the operator, once for all sequences that decode alike.

`additional_config={"iha_paged_kernel": True}` lets sequences decode without the gathering, by the
kernel of `iha.kernels.decode`. No GPU has run it, so it is off unless it is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from iha.hf.sequences import MOST_DECODED, attend_sequences, layer_attention, reach
from iha.integrations.vllm.paged import paged_attention

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from iha.hf.sequences import Decode


class InterleavedHeadAttention(Attention):
    """vLLM's attention layer for a transformers module that carries a mixing."""

    def __init__(
        self,
        module: nn.Module,
        *,
        cache_config: Any = None,
        per_layer_sliding_window: int | None = None,
        **arguments: Any,
    ) -> None:
        own = per_layer_sliding_window
        if own is None:
            own = getattr(cache_config, "sliding_window", None)
        seen = reach(module.iha, own)  # type: ignore[arg-type]
        super().__init__(
            cache_config=cache_config,
            # What the cache keeps: the query's own token and all that it reaches.
            per_layer_sliding_window=None if seen is None else seen + 1,
            attn_backend=Backend,
            **arguments,
        )
        self.own_window, self.reach = own, seen
        self._module = (module,)  # not a submodule: this layer is one of its submodules

    @property
    def module(self) -> Any:
        """The transformers module, with `head_mixing` and its settings `iha`."""
        return self._module[0]


class Backend(AttentionBackend):
    """What vLLM asks about an attention implementation."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM wants a name of its own list, and nothing else goes by it

    @staticmethod
    def get_impl_cls() -> type[Implementation]:
        return Implementation

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


@dataclasses.dataclass
class Metadata:
    """Which rows of a step belong to which sequence, and where its pages are."""

    counts: list[int]  # queries of each sequence
    lengths: Int[Tensor, " sequences"]  # tokens of each, its queries' own included
    pages: Int[Tensor, "sequences most"]
    paged_kernel: bool

    @functools.cached_property
    def known_lengths(self) -> list[int]:
        """Once a step, since it waits for the device."""
        return self.lengths.tolist()


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Reads the counts once per step, for all layers."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        options: Any = vllm_config.additional_config
        self.paged_kernel = isinstance(options, dict) and bool(options.get("iha_paged_kernel"))

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Metadata:
        common = common_attn_metadata
        return Metadata(
            common.query_start_loc_cpu.diff().tolist(),
            common.seq_lens,
            common.block_table_tensor,
            self.paged_kernel,
        )


class Implementation(AttentionImpl[Metadata]):
    """Writes the cache, and attends over it through the operator."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **foreign: Any,
    ) -> None:
        refused = {"alibi_slopes": alibi_slopes, **foreign}
        refused["kv_sharing_target_layer_name"] = kv_sharing_target_layer_name
        for name, given in refused.items():
            if given is not None:
                raise ValueError(f"this model has {name} ({given!r}), which IHA does not have.")
        if attn_type != AttentionType.DECODER:
            raise ValueError(f"IHA is served in decoders, and this attention is {attn_type!r}.")
        if kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
            raise ValueError(
                f"kv_cache_dtype={kv_cache_dtype!r} quantises the cache, which IHA does not read;"
                " use 'auto'."
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_size, self.scale = head_size, float(scale)
        self.kv_cache_dtype, self.softcap = kv_cache_dtype, logits_soft_cap
        self.sliding_window = sliding_window

    def do_kv_cache_update(
        self,
        layer: Any,
        key: Float[Tensor, "T G d"],
        value: Float[Tensor, "T G d"],
        kv_cache: Float[Tensor, "blocks G block_tokens 2*d"],
        slot_mapping: Int[Tensor, " T"],
    ) -> None:
        """Write each token's base key and value into its slot; padding has a negative one."""
        count, size = slot_mapping.shape[0], kv_cache.shape[2]
        real = slot_mapping >= 0
        slots = slot_mapping[real]
        pairs = torch.cat((key[:count][real], value[:count][real]), dim=-1)
        kv_cache[slots // size, :, slots % size] = pairs.to(kv_cache.dtype)

    def forward(
        self,
        layer: InterleavedHeadAttention,
        query: Float[Tensor, "T H d"],
        key: Tensor,
        value: Tensor,
        kv_cache: Float[Tensor, "blocks G block_tokens 2*d"],
        attn_metadata: Metadata | None,
        output: Float[Tensor, "T H d"],
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("the output of IHA cannot be quantised; leave it as it is.")
        if attn_metadata is None:  # vLLM measures memory, with no cache yet
            return output.zero_()
        pages, size, d = attn_metadata.pages, kv_cache.shape[2], self.head_size

        def fetch(batch: list[int], positions: Int[Tensor, "b S"]) -> tuple[Tensor, Tensor]:
            blocks = pages[batch].gather(1, positions // size)
            tokens = kv_cache[blocks, :, positions % size].transpose(1, 2).to(query.dtype)
            return tokens[..., :d], tokens[..., d:]

        options: Any = {
            "sliding_window": layer.own_window,
            "scale": self.scale,
            "softcap": self.softcap,
        }
        mixing, settings = layer.module.head_mixing, layer.module.iha
        attend = layer_attention(mixing, settings, device=query.device, **options)
        decode: Decode | None = None
        if attn_metadata.paged_kernel and kv_cache.dtype == query.dtype:
            lengths = attn_metadata.lengths
            decode = paged_attention(
                mixing, settings, kv_cache, pages=pages, lengths=lengths, **options
            )
        counts = attn_metadata.counts
        needed = decode is None or max(counts, default=0) > MOST_DECODED
        found = attend_sequences(
            query, counts, attn_metadata.known_lengths if needed else (), fetch, attend,
            reach=layer.reach, decode=decode,
        )  # fmt: skip
        return output.copy_(found)
