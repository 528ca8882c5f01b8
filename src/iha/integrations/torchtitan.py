"""IHA in torchtitan 0.3: an inner attention, and overrides that put it into a config.

    torchrun … -m torchtitan.train --module llama3 --config llama3_debugmodel \
        --override.imports 'iha.integrations.torchtitan.interleaved={"pseudo_heads": 4}'

`scheduled={"pseudo_heads": 4, "seq_len": 8192}` is the paper's schedule of layers. The model must
hand over document boundaries (`attn_backend="varlen"`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.config.override import override
from torchtitan.models.common.attention import GQAttention, VarlenAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.decoder_sharding import (
    dense_activation_placement,
    dense_param_placement,
)
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import LocalMapConfig, ShardingConfig

from iha.modules.head_mixing import HeadMixing
from iha.operator import interleaved_head_attention
from iha.schedule import hybrid_schedule

NAMES = ("alpha_q", "alpha_k", "alpha_v", "collapse")


class InterleavedInner(HeadMixing, Module):
    """The attention between projections: (B, N, H, d) queries that are rotated, and so on."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):  # what torchtitan gives document boundaries to
        n_heads: int
        n_kv_heads: int
        pseudo_heads: int
        init: str = "upcycle"
        causal: str = "flat"
        window: int | None = None
        backend: str = "auto"

    def __init__(self, config: Config) -> None:
        sizes: dict[str, Any] = {"num_kv_heads": config.n_kv_heads, "init": config.init}
        HeadMixing.__init__(self, config.n_heads, pseudo_heads=config.pseudo_heads, **sizes)
        self.options: dict[str, Any] = {
            name: getattr(config, name) for name in ("causal", "window", "backend")
        }

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Any = None,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        documents = None
        if attention_masks is not None:
            B, N = q_BLNH.shape[:2]
            tokens = torch.arange(B * N, device=q_BLNH.device)
            ends = attention_masks.cu_seq_q[1:].contiguous()
            documents = torch.searchsorted(ends, tokens, right=True).view(B, N)
        tensors = (getattr(self, name) for name in NAMES)
        mixing = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return interleaved_head_attention(
            q_BLNH, k_BLNH, v_BLNH, *mixing,
            document_ids=documents, scale=scale, layout="bshd", **self.options,
        )  # fmt: skip


def sharding() -> ShardingConfig:
    """Tensor parallelism: heads are gathered before the mixing and split again behind it."""
    split, whole = (dense_activation_placement(tp=tp) for tp in (spmd.S(2), spmd.R))
    inputs = ("q_BLNH", "k_BLNH", "v_BLNH")
    return ShardingConfig(
        state_shardings=dict.fromkeys(NAMES, dense_param_placement(tp=spmd.R)),
        in_src_shardings=dict.fromkeys(inputs, split),
        in_dst_shardings=dict.fromkeys(inputs, whole),
        out_src_shardings=whole,
        out_dst_shardings=split,
        local_map=LocalMapConfig(in_grad_placements=(whole,) * 3),
    )


@override(target=GQAttention.Config, description="Interleaved Head Attention")
def interleaved(config: Any, pseudo_heads: int = 2, **options: Any) -> Any:
    """The layer's config with IHA inside; `options` are init, causal, window and backend."""
    if not isinstance(config.inner_attention, VarlenAttention.Config):
        raise ValueError(
            f"IHA needs document boundaries, which {type(config.inner_attention).__qualname__} is"
            " not given; build the model with attn_backend='varlen'."
        )
    if config.inner_attention.window_size != (-1, 0):
        raise ValueError(
            f"the layer has window_size = {config.inner_attention.window_size}; give `window` in"
            " tokens to the override, and the layer the window_size (-1, 0)."
        )
    heads = {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads or config.n_heads}
    inner = InterleavedInner.Config(
        **heads, pseudo_heads=pseudo_heads, sharding_config=sharding(), **options
    )
    return dataclasses.replace(config, inner_attention=inner)


@override(target=Decoder.Config, description="IHA, the paper's schedule of layers")
def scheduled(config: Any, pseudo_heads: int, seq_len: int, **options: Any) -> Any:
    """The model's config with window layers of IHA among plain global ones (`hybrid_schedule`)."""
    schedule, layers = hybrid_schedule(len(config.layers), seq_len, pseudo_heads), [*config.layers]
    for i in schedule.layers:
        attention = interleaved(
            layers[i].attention, pseudo_heads, **{"window": schedule.window, **options}
        )
        layers[i] = dataclasses.replace(layers[i], attention=attention)
    return dataclasses.replace(config, layers=layers)


def with_mixing(adapter: type) -> type:
    """A state-dict adapter of torchtitan that keeps the mixing tensors, under IHA's names there."""

    class Adapter(adapter):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            for name in NAMES:
                key = f"model.layers.{{}}.self_attn.head_mixing.{name}"
                self.from_hf_map[key] = f"layers.{{}}.attention.inner_attention.{name}"

    return Adapter
