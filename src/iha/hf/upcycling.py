"""Put IHA into a model, say so in its config, and put it in again when the model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from iha.call import Causality
from iha.checks import checked_noise
from iha.hf.attaching import parts
from iha.hf.attention_modules import attention_layers, chosen_layers, chosen_queries
from iha.hf.entry import Entry
from iha.hf.model_class import restore
from iha.hf.positions import find_rotations
from iha.modules.head_mixing import Init
from iha.rotary import RopeMode


def upcycle(
    model: Any,
    pseudo_heads: int | Mapping[int | str, int],
    layers: Iterable[int | str] | None = None,
    *,
    pseudo_queries: int | Mapping[int | str, int] | None = None,
    rope: RopeMode = "token",
    init: Init = "upcycle",
    causal: Causality = "flat",
    window: int | None = None,
    per_head_collapse: bool = False,
    value_noise: float = 0.1,
    query_noise: float = 0.1,
    backend: str = "auto",
) -> Any:
    """Give a Hugging Face model Interleaved Head Attention, in place; return it.

    Every chosen attention module gets four small tensors (`module.head_mixing`, an
    `iha.HeadMixing`), and the model calls IHA's attention function. With the defaults the model
    computes the same function as before, to rounding (arXiv 2602.21371 has no such start; the
    conditions are in docs/definition.md). What was done is recorded in `model.config.iha`, so that
    `save_pretrained` and, after `import iha.hf`, `from_pretrained` simply work.

    Args:
        model: any model whose attention goes through transformers' attention interface. Of a
            composite one (a VLM) give the whole, and choose the text model's layers: a whole
            that does not know of its part loads as a plain one with `trust_remote_code=True`.
        pseudo_heads: P, or a mapping from layer to P; a mapping also chooses the layers.
        layers: indices, or patterns of module names such as "decoder.*.self_attn". Default: all.
            The other layers keep their attention.
        pseudo_queries: Pq ≤ P, or a mapping from layer to Pq; default P. A layer's attention costs
            Pq·P times a plain layer's instead of P², and the start is exact for every Pq.
        rope: "token" keeps the model's positions, which exact upcycling needs; "fractional" and
            "virtual" (the paper's) turn pseudo-heads apart, and "virtual" stretches positions by P.
        init: how the mixing tensors start, see `iha.HeadMixing`.
        causal: "flat" (the paper's) or "token", for the layers that are causal.
        window: W tokens for the chosen causal layers, for models trained from scratch on
            `iha.hybrid_schedule`. A window of the model's own stays in force all the same.
        per_head_collapse: one weight a pseudo-head instead of a map between all heads.
        value_noise, query_noise: standard deviations of the free part of `init="upcycle"`.
        backend: as in `iha.interleaved_head_attention`.

    Raises:
        TypeError: the model is none of transformers', or `layers` is a single name or number.
        ValueError: the model is already upcycled, has no attention interface, or has something
            that the operator does not have; P < 1; an unknown layer; a `rope` the model cannot do.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers model, got {type(model).__name__}; upcycle before"
            " wrapping it (PEFT, torch.compile), and build a model of your own with"
            " iha.InterleavedHeadAttention."
        )
    if any(getattr(part.config, "iha", None) is not None for part in parts(model)):
        raise ValueError(
            "model is already upcycled (its config has the entry iha); load the original checkpoint"
            " to upcycle it differently."
        )
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(
            "model is sharded already (fully_shard, or tensor parallelism): each rank would draw"
            " mixing tensors of its own; upcycle first, then shard."
        )
    # All is checked before the model is touched.
    value_noise = checked_noise("value_noise", value_noise)
    query_noise = checked_noise("query_noise", query_noise)
    chosen = chosen_layers(model, layers, pseudo_heads)
    entry = Entry(
        base_model=type(model.base_model).__name__,
        pseudo_heads=chosen,
        pseudo_queries=chosen_queries(model, chosen, pseudo_queries),
        rope=rope,
        causal=causal,
        window=window,
        init=init,
        per_head_collapse=per_head_collapse,
        backend=backend,
    )
    rotation, unrotated = find_rotations(model, chosen, rope)
    entry = dataclasses.replace(
        entry, rotary=rotation.convention, rotary_start=rotation.start, unrotated=unrotated
    )
    _write(entry, model)
    restore(model, value_noise=value_noise, query_noise=query_noise)
    if model.config.name_or_path:
        # What loads the model again by this name (TRL its reference model, PEFT the base of an
        # adapter) would get the plain one, so it is no name any more: the error quotes it.
        model.config.name_or_path += " (upcycled in memory: save it, and load that)"
        model.name_or_path = model.config.name_or_path
    return model


def drop_unread_queries(model: PreTrainedModel) -> dict[str, int]:
    """Remove pseudo-queries that no R reads, in place; return how many each layer keeps.

    The function stays the same, at Pq·P instead of P² times a plain layer's attention. Right after
    an exact start one pseudo-query per layer is left. See `iha.HeadMixing.drop_unread_`.

    Raises ValueError if the model has no mixing tensors.
    """
    entry = Entry.read(model.config)
    if entry is None:
        raise ValueError("model has no mixing tensors; upcycle it first (iha.upcycle).")
    modules: dict[str, Any] = {layer.name: layer.module for layer in attention_layers(model)}
    kept = {name: modules[name].head_mixing.drop_unread_() for name in entry.pseudo_heads}
    _write(dataclasses.replace(entry, pseudo_queries=kept), model)
    return kept


def _write(entry: Entry, model: PreTrainedModel) -> None:
    """Also into the config of each model inside: it may be saved, or loaded, by itself."""
    named = {id(layer.module): layer.name for layer in attention_layers(model)}
    named = {module: name for module, name in named.items() if name in entry.pseudo_heads}
    for part in parts(model):
        if any(id(module) in named for module in part.modules()):
            # Name of each layer in the part → its name in the model.
            names = {
                layer.name: named[id(layer.module)]
                for layer in attention_layers(part)
                if id(layer.module) in named
            }
            dataclasses.replace(
                entry,
                base_model=type(part.base_model).__name__,
                pseudo_heads={name: entry.pseudo_heads[whole] for name, whole in names.items()},
                pseudo_queries={n: entry.pseudo_queries[whole] for n, whole in names.items()},
                unrotated=[name for name, whole in names.items() if whole in entry.unrotated],
            ).write(part.config)
