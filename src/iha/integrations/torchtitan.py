"""IHA in torchtitan 0.3, without a change of its files: two overrides and a state-dict adapter.

    torchrun … -m torchtitan.train --module llama3 --config CONFIG --override.imports \
        'iha.integrations.torchtitan.interleaved={"pseudo_heads": 4, "init": "upcycle"}' \
        iha.integrations.torchtitan.undecayed

Importing this module also makes torchtitan's adapters to Hugging Face's names keep the mixing
tensors, where a model has them. As they are, they drop without a word what they do not know.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config.override import derive, override
from torchtitan.models.common import RoPE, decoder_sharding
from torchtitan.models.common.attention import GQAttention, VarlenAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import LocalMapConfig, ShardingConfig
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.tools.logging import logger

from iha import HeadMixing, hybrid_schedule, interleaved_head_attention, phase_tables

MIXING, BASE = ("alpha_q", "alpha_k", "alpha_v", "collapse"), ("q_BLNH", "k_BLNH", "v_BLNH")


class InterleavedInner(HeadMixing, Module):
    """The inner attention of a `GQAttention` layer; under tensor parallelism it sees all heads."""

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):  # what torchtitan gives the documents' bounds to
        heads: dict[str, Any]  # arguments of HeadMixing
        options: dict[str, Any]  # and of the operator
        mode: str
        rotation: RoPE.Config  # the layer's, for two positions: they tell its frequencies

        def build(self, **_: Any) -> Any:
            # Heads are gathered before the mixing and split again behind it. Said here, since a
            # model sets the sharding of its own inner attention on whatever it finds.
            place = decoder_sharding.dense_activation_placement
            split, whole = place(tp=spmd.S(2)), place(tp=spmd.I)
            kept = decoder_sharding.dense_param_placement(tp=spmd.I)
            self.rotation.sharding_config = ShardingConfig(state_shardings={"cache": kept})
            self.sharding_config = ShardingConfig(
                state_shardings=dict.fromkeys(MIXING, kept),
                in_src_shardings=dict.fromkeys(BASE, split),
                in_dst_shardings=dict.fromkeys(BASE, whole),
                out_src_shardings=whole,
                out_dst_shardings=split,
                local_map=LocalMapConfig(in_grad_placements=(whole,) * 3),
            )
            return VarlenAttention.Config.build(self)

    def __init__(self, config: Config) -> None:
        super().__init__(**config.heads)
        self.options, self.mode = config.options, config.mode
        self.rotation = None if self.mode == "token" else config.rotation.build()

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,  # the heads say it themselves
    ) -> Tensor:
        with spmd.no_typecheck():
            (B, L), d = q_BLNH.shape[:2], q_BLNH.shape[-1]
            options = {**self.options, "scale": scale, "layout": "bshd"}
            if attention_masks is not None:
                tokens = torch.arange(B * L, device=q_BLNH.device)
                documents = torch.searchsorted(attention_masks.cu_seq_q, tokens, right=True)
                options["document_ids"] = documents.view(B, L)
            if self.rotation is not None:
                turn = _local(self.rotation.cache)[1]  # what turns the token at position 1
                pairs = turn.is_complex()
                cos, sin = (turn.real, turn.imag) if pairs else turn.chunk(2)
                frequencies = torch.atan2(sin, cos)[: d // 2]
                options["phase"] = phase_tables(self.pseudo_heads, frequencies, self.mode)
                options["rotary"] = "pairs" if pairs else "half"
            mixing = (_local(self.get_parameter(name)) for name in MIXING)
            return interleaved_head_attention(q_BLNH, k_BLNH, v_BLNH, *mixing, **options)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@functools.cache
def _strided(rope: type[RoPE]) -> type[RoPE]:
    """The same rotary module, which turns token n by the angle of position n·stride."""

    class Strided(rope):
        @dataclass(kw_only=True, slots=True)
        class Config(rope.Config):
            stride: int

        def _precompute_cache(self) -> Tensor:
            step, tokens = self.config.stride, self.config.max_seq_len
            every = rope(derive(self.config, rope.Config, max_seq_len=step * tokens)).cache
            return every[::step].contiguous()

    return Strided


@override(target=Decoder.Config, description="Interleaved Head Attention")
def interleaved(
    config: Any,
    pseudo_heads: int,
    *,
    init: str,
    layers: Sequence[int] | None = None,
    pattern: str | None = None,
    window: int | None = None,
    causal: str = "flat",
    rope: str = "token",
    backend: str = "auto",
    **heads: Any,
) -> Any:
    """Give layers of a model's config IHA, in place.

    The arguments are those of `iha.upcycle`; `heads` is what else `HeadMixing` takes. `layers` are
    indices, all by default. `pattern="SSSSL"` sets layers and window by the paper's schedule
    instead (`iha.hybrid_schedule`), for the length in tokens that the config has. Raises
    ValueError for attention other than `GQAttention` over `VarlenAttention`.
    """
    heads |= {"pseudo_heads": pseudo_heads, "init": init}
    if pattern is not None:
        if layers is not None or window is not None:
            raise ValueError("pattern sets layers and window; leave these out beside it.")
        sizes = (len(config.layers), config.max_seq_len, pseudo_heads)
        queries = heads.get("pseudo_queries")
        schedule = hybrid_schedule(*sizes, pseudo_queries=queries, pattern=pattern)
        layers, window = schedule.layers, schedule.window
    changed: dict[int, Any] = {}
    for i in range(len(config.layers)) if layers is None else layers:
        layer = config.layers[i].attention
        inner = getattr(layer, "inner_attention", None)
        causally = type(inner) is VarlenAttention.Config and inner.window_size == (-1, 0)
        if type(layer) is not GQAttention.Config or not causally:
            raise ValueError(
                f"layer {i} needs GQAttention over VarlenAttention (attn_backend='varlen') without"
                f" window_size, got {type(layer).__qualname__} over {inner}."
            )
        inner = InterleavedInner.Config(
            heads={"num_heads": layer.n_heads, "num_kv_heads": layer.n_kv_heads, **heads},
            options={"causal": causal, "window": window, "backend": backend},
            mode=rope,
            rotation=replace(layer.rope, max_seq_len=2),
        )
        turned = layer.rope
        if rope == "virtual":
            turned = derive(turned, _strided(turned._owner).Config, stride=pseudo_heads)
        changed[i] = replace(layer, inner_attention=inner, rope=turned)
    for i, attention in changed.items():  # in place, since the trainer holds on to this very config
        config.layers[i].attention = attention
    return config


@override(target=OptimizersContainer.Config, description="mixing tensors do not decay")
def undecayed(config: Any, lr: float | None = None) -> Any:
    """An optimizer's config with a group of the first Adam's kind for the mixing tensors."""
    like = next((g for g in config.param_groups if g.optimizer_name in ("AdamW", "Adam")), None)
    if like is None:
        raise ValueError("mixing tensors are for Adam or AdamW, which no group of param_groups is.")
    own = {"weight_decay": 0.0, "lr": like.optimizer_kwargs["lr"] if lr is None else lr}
    names = rf"inner_attention\.({'|'.join(MIXING)})$"
    mixing = replace(like, pattern=names, optimizer_kwargs={**like.optimizer_kwargs, **own})
    return replace(config, param_groups=[mixing, *config.param_groups])


def _starts(config: Any) -> dict[int, str]:
    """The layers that have IHA, and how they start."""
    found = {i: getattr(one.attention, "inner_attention", None) for i, one in enumerate(config)}
    kind = InterleavedInner.Config
    return {i: inner.heads["init"] for i, inner in found.items() if isinstance(inner, kind)}


class _Keeping:
    """Mixing tensors are kept, under the names that they have in an IHA folder of transformers."""

    def __init__(self: Any, config: Any, path: str | None) -> None:
        super().__init__(config, path)
        self.starts, ours = _starts(config.layers), "layers.{}.attention.wo.weight"
        theirs = next(name for name, own in self.from_hf_map.items() if own == ours)
        for mixing in MIXING:
            name = theirs.replace("o_proj.weight", f"head_mixing.{mixing}")
            self.from_hf_map[name] = ours.replace("wo.weight", f"inner_attention.{mixing}")
            files: dict[str, int] = self.fqn_to_index_mapping or {}  # beside the layer's others
            files |= {name.format(i): files[theirs.format(i)] for i in self.starts if files}

    def to_hf(self: Any, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        self.asked = super().to_hf(state_dict)
        return self.asked

    def get_hf_storage_reader(self: Any, path: str, *arguments: Any) -> Any:
        """A folder without any mixing tensors (a plain model) leaves the exact start as it is."""
        reader = super().get_hf_storage_reader(path, *arguments)
        mixing = {name for name in self.asked if ".head_mixing." in name}
        if not mixing & reader.read_metadata().state_dict_metadata.keys():
            if {*self.starts.values()} != {"upcycle"}:
                raise ValueError(f"{path} has no mixing tensors, which needs init='upcycle'.")
            logger.info(f"{path} has no mixing tensors: they start as init='upcycle' says.")
            for name in mixing:
                del self.asked[name]
        return reader


@functools.cache
def _keeping(adapter: type) -> type:
    return type(adapter.__name__, (_Keeping, adapter), {})


def _new(cls: type, config: Any, path: str | None = None) -> Any:
    mixed = not issubclass(cls, _Keeping) and _starts(getattr(config, "layers", ()))
    return object.__new__(_keeping(cls) if mixed else cls)


StateDictAdapter.__new__ = staticmethod(_new)
