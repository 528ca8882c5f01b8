"""What an attention module is, in a Hugging Face model: found by what it does, not by its class."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
    """One module that calls the attention interface. `name` is relative to the base model."""

    name: str
    index: int | None
    module: nn.Module

    @property
    def num_heads(self) -> int:
        return _first(self.module, "num_heads", "num_attention_heads")

    @property
    def num_kv_heads(self) -> int:
        # What transformers' own SDPA function goes by.
        return self.num_heads // getattr(self.module, "num_key_value_groups", 1)

    @property
    def causal(self) -> bool:
        return bool(getattr(self.module, "is_causal", True))

    def refusal(self) -> str | None:
        """Why IHA cannot serve this module, where its attributes already show it."""
        if getattr(self.module, "sinks", None) is not None:
            return "it has attention sinks, a softmax term that the operator does not have"
        if hasattr(self.module, "relative_attention_bias") or getattr(
            self.module, "has_relative_attention_bias", False
        ):
            return "it adds a position bias to the scores, which a boolean mask cannot express"
        v_dim, qk_dim = (getattr(self.module, n, None) for n in ("v_head_dim", "qk_head_dim"))
        if v_dim != qk_dim:
            return f"its values have another head dimension ({v_dim}) than its keys ({qk_dim})"
        return None


def attention_layers(model: Any) -> list[AttentionLayer]:
    """Every module whose forward dispatches through `ALL_ATTENTION_FUNCTIONS`."""
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    layers: list[AttentionLayer] = []
    for path, module in model.named_modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
            continue
        number = re.search(r"\.(\d+)\.", f".{path}.")
        index = int(number[1]) if number else getattr(module, "layer_idx", None)
        layers.append(AttentionLayer(path.removeprefix(prefix), index, module))
    if not layers:
        raise ValueError(
            f"model ({type(model).__name__}) has no module that uses transformers' attention"
            " interface, which IHA plugs into; use an architecture that does (most do since"
            " transformers 4.48), or build the layer with iha.InterleavedHeadAttention."
        )
    return layers


def chosen_layers(
    model: Any, layers: Iterable[int | str] | None, pseudo_heads: int | Mapping[int | str, int]
) -> dict[str, int]:
    """Name of each chosen attention module → its P.

    A layer is an index (every attention module of that layer: an encoder-decoder has several) or
    a pattern of module names as in `fnmatch`, such as "decoder.*.self_attn".
    """
    found = attention_layers(model)
    sizes = pseudo_heads if isinstance(pseudo_heads, Mapping) else None
    if isinstance(layers, (int, str)):
        raise TypeError(f"layers must be a list of indices or name patterns, got {layers!r}.")
    wanted = sizes if layers is None else list(layers)
    for layer in (*(wanted or ()), *(sizes or ())):
        _check_known(layer, found)
    chosen: dict[str, int] = {}
    for layer in found:
        if wanted is not None and not any(_matches(layer, key) for key in wanted):
            continue
        if sizes is None:
            size: Any = pseudo_heads
        else:
            size = next((P for key, P in sizes.items() if _matches(layer, key)), None)
            if size is None:
                raise ValueError(f"pseudo_heads has no entry for the chosen layer {layer.name!r}.")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"pseudo_heads must be an integer of at least 1, got {size!r}.")
        why_not = layer.refusal()
        if why_not is not None:
            raise ValueError(
                f"layer {layer.name!r} ({type(layer.module).__name__}) cannot become IHA:"
                f" {why_not}; choose other layers, or another model."
            )
        chosen[layer.name] = size
    if not chosen:
        raise ValueError("layers chooses no attention module; leave it out to choose all.")
    return chosen


def _matches(layer: AttentionLayer, key: int | str) -> bool:
    return layer.index == key if isinstance(key, int) else fnmatch.fnmatch(layer.name, key)


def _check_known(key: int | str, found: list[AttentionLayer]) -> None:
    if any(_matches(layer, key) for layer in found):
        return
    indices = sorted({layer.index for layer in found if layer.index is not None})
    raise ValueError(
        f"layers names {key!r}, which the model does not have; it has the layers"
        f" {indices[0]} to {indices[-1]}, with modules such as {found[0].name!r}."
        if indices
        else f"layers names {key!r}, which the model does not have; it has {found[0].name!r}."
    )


def _first(module: nn.Module, *names: str) -> int:
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            if isinstance(size := getattr(holder, name, None), int):
                return size
    raise ValueError(
        f"{type(module).__name__} says nowhere how many heads it has ({', '.join(names)});"
        " IHA cannot size its mixing tensors."
    )
