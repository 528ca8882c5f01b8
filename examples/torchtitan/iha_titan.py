"""IHA in torchtitan 0.3 by overrides, for layers or by the paper's schedule: docs/scale-out.md."""

from dataclasses import dataclass, replace
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.config.override import override
from torchtitan.models.common import decoder_sharding
from torchtitan.models.common.attention import GQAttention, VarlenAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import LocalMapConfig, ShardingConfig

from iha import HeadMixing, hybrid_schedule, interleaved_head_attention

BASE, MIXING = ("q_BLNH", "k_BLNH", "v_BLNH"), ("alpha_q", "alpha_k", "alpha_v", "collapse")


class InterleavedInner(HeadMixing, Module):
    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):  # what torchtitan gives document boundaries to
        heads: dict[str, Any]
        options: dict[str, Any]

    def __init__(self, config: Config) -> None:
        HeadMixing.__init__(self, **config.heads)
        self.options = config.options

    def forward(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, **given: Any) -> Tensor:
        options, masks = {**self.options, "scale": given.get("scale")}, given.get("attention_masks")
        if masks is not None:
            tokens = torch.arange(q_BLNH.shape[:2].numel(), device=q_BLNH.device)
            documents = torch.searchsorted(masks.cu_seq_q[1:].contiguous(), tokens, right=True)
            options["document_ids"] = documents.view(q_BLNH.shape[:2])
        mixing = [
            t.to_local() if isinstance(t, DTensor) else t for t in map(self.get_parameter, MIXING)
        ]
        return interleaved_head_attention(q_BLNH, k_BLNH, v_BLNH, *mixing, layout="bshd", **options)


def sharding() -> ShardingConfig:
    """Tensor parallelism: heads are gathered before the mixing and split again behind it."""
    split, whole = (decoder_sharding.dense_activation_placement(tp=t) for t in (spmd.S(2), spmd.R))
    return ShardingConfig(
        state_shardings=dict.fromkeys(MIXING, decoder_sharding.dense_param_placement(tp=spmd.R)),
        in_src_shardings=dict.fromkeys(BASE, split),
        in_dst_shardings=dict.fromkeys(BASE, whole),
        out_src_shardings=whole,
        out_dst_shardings=split,
        local_map=LocalMapConfig(in_grad_placements=(whole,) * 3),
    )


@override(target=GQAttention.Config, description="Interleaved Head Attention")
def interleaved(config: Any, pseudo_heads: int = 2, init: str = "upcycle", **options: Any) -> Any:
    """The layer's config with IHA inside; `options` are causal, window and backend."""
    if getattr(config.inner_attention, "window_size", None) != (-1, 0):
        raise ValueError(
            f"IHA needs attn_backend='varlen' without window_size, got {config.inner_attention}"
        )
    H, G = config.n_heads, config.n_kv_heads or config.n_heads
    heads = {"num_heads": H, "num_kv_heads": G, "pseudo_heads": pseudo_heads, "init": init}
    inner = InterleavedInner.Config(heads=heads, options=options, sharding_config=sharding())
    return replace(config, inner_attention=inner)


@override(target=Decoder.Config, description="IHA, the paper's schedule of layers")
def scheduled(config: Any, pseudo_heads: int, seq_len: int, **options: Any) -> Any:
    """The model's config with window layers of IHA among plain global ones (`hybrid_schedule`)."""
    schedule, layers = hybrid_schedule(len(config.layers), seq_len, pseudo_heads), [*config.layers]
    options = {"window": schedule.window, **options}
    for i in schedule.layers:
        attention = interleaved(layers[i].attention, pseudo_heads, **options)
        layers[i] = replace(layers[i], attention=attention)
    return replace(config, layers=layers)


def with_mixing(adapter: type) -> type:
    """A state-dict adapter of torchtitan that keeps the mixing tensors, under IHA's names there."""

    def init(self: Any, *arguments: Any) -> None:
        adapter.__init__(self, *arguments)
        ours, theirs = (
            "layers.{}.attention.inner_attention.",
            "model.layers.{}.self_attn.head_mixing.",
        )
        self.from_hf_map |= {theirs + name: ours + name for name in MIXING}

    return type(adapter.__name__, (adapter,), {"__init__": init})
