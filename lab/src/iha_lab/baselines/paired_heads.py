"""Paired Head Attention."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from iha.hf.attention_modules import AttentionLayer, attention_layers
from iha.hf.layer_settings import LayerSettings, rotate_as_virtual
from iha.hf.positions import find_rotary, find_rotations
from iha.rotary import Phase, rotate
from iha_lab.baselines.baseline import Baseline, Inputs, plain_flops, sizes
from iha_lab.baselines.equipping import BaselineConfig


class PairedHeadsConfig(BaselineConfig):
    """Paired Head Attention (modded-nanogpt, record of 2026-01-07): IHA without learned mixing.

    `rope` is as in IHA: the record's positions are "virtual", 2n + p.
    """

    kind: Literal["paired-heads"] = "paired-heads"
    rope: Literal["virtual", "token", "fractional"] = "virtual"

    @property
    def label(self) -> str:
        return self.kind if self.rope == "virtual" else f"{self.kind}-{self.rope}"

    def build(self, layer: AttentionLayer) -> PairedHeads:
        return PairedHeads(*sizes(layer))

    def equip(self, model: Any, seq_len: int | None) -> Any:
        layers = attention_layers(model)
        rotation, unrotated = find_rotations(model, [layer.name for layer in layers], self.rope)
        super().equip(model, seq_len)
        for layer in layers:
            module: Any = layer.module
            turns = self.rope != "token" and layer.name not in unrotated
            module.baseline.settings = module.iha = LayerSettings(
                num_heads=layer.num_heads,
                num_kv_heads=layer.num_kv_heads,
                pseudo_heads=2,
                causal="flat",
                window=None,
                rope=self.rope,
                rotary=rotation.convention,
                rotary_start=rotation.start,
                positions=find_rotary(model, layer.name) if turns else None,
                backend="auto",
            )
            if turns and self.rope == "virtual":
                module.register_forward_pre_hook(rotate_as_virtual, with_kwargs=True)
        return model


class PairedHeads(Baseline):
    """Two heads interleave their tokens in one sequence (modded-nanogpt, record of 2026-01-07).

    H heads make H/2 pairs. Pair j is one head over 2N tokens: token 2n + p is token n of head
    j + p·H/2, p = 0, 1, for queries, keys and values; one softmax over all of them, causal along
    2n + p. Output head j + p·H/2 at n is what token 2n + p of pair j gives. Key/value heads pair
    the same way, g and g + G/2. In terms of IHA: P = 2, one-hot α and R, H/2 · 2 pseudo-heads in
    place of H · 2. No parameters; forward 4·H/2·d FLOPs per visible pair of the 2N tokens, twice
    plain attention's.

    Read in the record's own code (KellerJordan/modded-nanogpt, PairedHeadCausalSelfAttention):
    the views that interleave heads j and j + H/2, flat causality, positions 2n + p, and that 4 of
    11 layers have it. Two things differ here. The record turns head h by 2n + (h mod 2), which is
    2n + p only where its p is h's parity; its text says "head 1 at an offset from head 2", so this
    turns by p. And its window, gates and value embeddings belong to its model, not to the pairing.
    """

    settings: LayerSettings | None = None

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        for name, heads in (("query", num_heads), ("key/value", num_kv_heads)):
            if heads % 2:
                raise ValueError(
                    f"Paired Head Attention takes {name} heads in pairs, and the model has {heads};"
                    " give it an even number."
                )

    def forward(self, inputs: Inputs) -> Float[Tensor, "B H N d"]:
        N, S, device = inputs.query.shape[2], inputs.key.shape[2], inputs.query.device
        visible = inputs.visible
        if visible is None and N == 1:
            visible = inputs.mask()  # the token's first head does not see its second
        if visible is not None:
            visible = visible.expand(*visible.shape[:2], N, S)
            visible = visible.repeat_interleave(2, -1).repeat_interleave(2, -2)
            if inputs.causal:
                first = 2 * (S - N if inputs.offset is None else inputs.offset)
                own = torch.arange(2 * N, device=device)[:, None] + first
                visible = visible & (torch.arange(2 * S, device=device) <= own)
        query, key = inputs.query, inputs.key
        phase = None
        if self.settings is not None:
            query, key = self.settings.aligned(query, key)
            phase = self.settings.phase(device)
        paired = dataclasses.replace(
            inputs,
            query=self.interleaved(query, phase),
            key=self.interleaved(key, phase),
            value=self.interleaved(inputs.value),
            visible=visible,
        )
        return paired.attend().unflatten(2, (-1, 2)).movedim(3, 1).flatten(1, 2)

    def interleaved(
        self, heads: Float[Tensor, "B H N d"], phase: Phase | None = None
    ) -> Float[Tensor, "B h M d"]:
        """Write the tokens of heads j and j + H/2 in turn, each turned by its phase."""
        pairs = heads.unflatten(1, (2, -1)).transpose(1, 2)
        if phase is not None and self.settings is not None:
            cos, sin = (table[:, None] for table in phase)
            pairs = rotate(pairs, (cos, sin), self.settings.rotary)
        return pairs.transpose(2, 3).flatten(2, 3)

    def flops(self, seq_len: int, causal: bool) -> int:
        return plain_flops(2 * seq_len, self.num_heads // 2, self.head_dim, causal)
