"""What an attention module is, in a Hugging Face model: found by what it does, not by its class."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import inspect
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from iha.checks import checked_size

# Arguments by which a module attends to another sequence than its own.
OTHER_SEQUENCE = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
# What a layer calls on the cache to read or write a state that is no keys and values.
_STATES = {"has_previous_state", "update_conv_state", "update_recurrent_state", "set_linear_cache"}
# What a module calls the tensors that make it more than a softmax of scaled scores.
_FOREIGN = {
    r"sink": "attention sinks, a softmax term that the operator does not have",
    r"relative|rel_pos|rel_logits|pos(ition)?_bias|distance_embedding": (
        "a learned position bias, which a boolean mask cannot express"
    ),
}


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
    """One module that calls the attention interface. `name` is relative to the base model.

    `part` is the model, of one or several in a composite one, that makes the module's masks.
    """

    name: str
    index: int | None
    module: nn.Module
    part: nn.Module

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
        """Why IHA cannot serve this module, where its tensors or its code already show it."""
        tensors = [*self.module.named_parameters(), *self.module.named_buffers()]
        for pattern, what in _FOREIGN.items():
            if any(re.search(pattern, name) for name, _ in tensors):
                return f"it has {what}"
        v_dim = getattr(self.module, "v_head_dim", None)
        qk_dim = getattr(self.module, "qk_head_dim", getattr(self.module, "head_dim", None))
        if v_dim is not None and v_dim != qk_dim:
            return f"its values have another head dimension ({v_dim}) than its keys ({qk_dim})"
        silent = not hasattr(self.module, "is_causal") and "is_causal" not in _words(self.module)
        if silent and (self._decodes() or not _written_for_sdpa(self.part)):
            # SDPA takes it for causal where there is no mask, and IHA for neither where there is
            # one. That is right for the encoders and cross-attentions that were written for SDPA.
            return "nothing in it says whether it is causal (is_causal)"
        return None

    def _decodes(self) -> bool:
        """Whether it keeps the keys of the sequence that its queries come from."""
        taken = inspect.signature(type(self.module).forward).parameters
        return "past_key_values" in taken and not may_cross(type(self.module))

    def sees_all_without_a_mask(self) -> bool:
        """Whether a decoder leaves causality to masks, which SDPA and IHA leave out if they can.

        A model that transformers runs with SDPA is trusted to say it where SDPA looks.
        """
        if getattr(self.part, "_supports_sdpa", True):
            return False
        masks = {"create_causal_mask", "create_sliding_window_causal_mask"}
        makes_causal_masks = not masks.isdisjoint(_words(self.part))
        says_so = any(getattr(m, "is_causal", False) for m in self.part.modules())
        return makes_causal_masks and not says_so


@functools.cache
def may_cross(kind: type[nn.Module]) -> bool:
    """Whether a class of attention modules can attend to another sequence than its own."""
    return not set(OTHER_SEQUENCE).isdisjoint(inspect.signature(kind.forward).parameters)


def carries_a_state(part: nn.Module) -> bool:
    """Whether layers know earlier tokens by a state: they say so, or keep one in the cache."""
    return getattr(part, "_is_stateful", False) or any(
        not _STATES.isdisjoint(_words(module)) for module in part.modules()
    )


def _written_for_sdpa(part: nn.Module) -> bool:
    """Whether the model's own class says that it runs with SDPA."""
    classes = (c for c in type(part).__mro__ if c is not PreTrainedModel)
    return any(vars(c).get("_supports_sdpa", False) for c in classes)


def attention_layers(model: Any) -> list[AttentionLayer]:
    """Every module whose forward dispatches through `ALL_ATTENTION_FUNCTIONS`."""
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    parts: dict[str, nn.Module] = {"": model}
    layers: list[AttentionLayer] = []
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            parts[path] = module
        if "ALL_ATTENTION_FUNCTIONS" not in _words(module):
            files = {kind.__module__ for kind in type(module).__mro__}
            if "Attention" in type(module).__name__ and _forward(module).__module__ not in files:
                raise ValueError(replaced_forward(module))
            continue
        number = re.search(r"\.(\d+)\.", f".{path}.")
        index = int(number[1]) if number else getattr(module, "layer_idx", None)
        part = max((p for p in parts if f"{path}.".startswith(f"{p}." if p else "")), key=len)
        layers.append(AttentionLayer(path.removeprefix(prefix), index, module, parts[part]))
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
    sizes = _checked_sizes("pseudo_heads", pseudo_heads, found)
    if layers is None and isinstance(sizes, Mapping):
        layers = list(sizes)
    chosen: dict[str, int] = {}
    for layer in matching(found, layers):
        size = _size_of(layer, sizes)
        if size is None:
            raise ValueError(f"pseudo_heads has no entry for the chosen layer {layer.name!r}.")
        why_not = layer.refusal()
        if why_not is not None:
            raise ValueError(
                f"layer {layer.name!r} ({type(layer.module).__name__}) cannot become IHA:"
                f" {why_not}; choose other layers, or another model."
            )
        chosen[layer.name] = size
    for layer in found:
        # Of all layers: those that are not chosen are given the same masks.
        if layer.sees_all_without_a_mask():
            raise ValueError(
                f"model ({type(model).__name__}) cannot become IHA: {type(layer.part).__name__}"
                " makes causal masks, and no attention in it says that it is causal, so tokens"
                " would see later ones where the mask is left out; use another architecture."
            )
    if not chosen:
        name = "pseudo_heads" if layers is None else "layers"
        raise ValueError(f"{name} chooses no attention module; leave layers out to choose all.")
    return chosen


def matching(
    found: list[AttentionLayer], layers: Iterable[int | str] | None
) -> list[AttentionLayer]:
    """Those of `found` that `layers` names by index or pattern; all where it is None."""
    wanted = _checked_list(layers, found)
    return [x for x in found if wanted is None or any(_matches(x, key) for key in wanted)]


def replaced_forward(module: nn.Module) -> str:
    """What to say of an attention module whose forward leaves the attention interface out."""
    return (
        f"the forward of {type(module).__name__}, from {_forward(module).__module__!r}, calls no"
        " attention interface, so mixing would be ignored; load it without Unsloth or the like."
    )


def _forward(module: nn.Module) -> Any:
    """The forward that runs: the class's or the module's own, below wrappers (accelerate's)."""
    return inspect.unwrap(vars(module).get("forward", type(module).forward))


def _words(module: nn.Module) -> set[str]:
    """Every name and keyword that the module's forward uses."""
    code = getattr(_forward(module), "__code__", None)
    if code is None:
        return set()
    keywords = (c if isinstance(c, tuple) else (c,) for c in code.co_consts)
    constants = {w for ws in keywords for w in ws if isinstance(w, str)}
    return {*code.co_names, *code.co_varnames, *constants}


def chosen_queries(
    model: Any, chosen: dict[str, int], pseudo_queries: int | Mapping[int | str, int] | None
) -> dict[str, int]:
    """Name of each chosen attention module → its Pq; P where `pseudo_queries` does not say."""
    queries = dict(chosen)
    if pseudo_queries is None:
        return queries
    found = attention_layers(model)
    sizes = _checked_sizes("pseudo_queries", pseudo_queries, found)
    for layer in found:
        size = _size_of(layer, sizes)
        if layer.name in chosen and size is not None:
            queries[layer.name] = checked_size("pseudo_queries", size, at_most=chosen[layer.name])
    return queries


def _checked_sizes(
    name: str, sizes: int | Mapping[int | str, int], found: list[AttentionLayer]
) -> int | dict[int | str, int]:
    """The argument `name`, one size or one for each of some layers, if all of it makes sense."""
    if not isinstance(sizes, Mapping):
        return checked_size(name, sizes)
    if not sizes:
        raise ValueError(f"{name} must name at least one layer, got {{}}; give one number for all.")
    for layer in sizes:
        _check_known(name, layer, found)
    return {layer: checked_size(name, size) for layer, size in sizes.items()}


def _checked_list(
    layers: Iterable[int | str] | None, found: list[AttentionLayer]
) -> list[int | str] | None:
    if layers is None:
        return None
    try:
        if isinstance(layers, (str, bytes, Mapping, Tensor)):
            raise TypeError
        listed = list(layers)
    except TypeError:
        raise TypeError(
            f"layers must be a list of indices or name patterns, got {reprlib.repr(layers)}."
        ) from None
    for layer in listed:
        _check_known("layers", layer, found)
    return listed


def _size_of(layer: AttentionLayer, sizes: int | Mapping[int | str, int]) -> int | None:
    if not isinstance(sizes, Mapping):
        return sizes
    return next((size for key, size in sizes.items() if _matches(layer, key)), None)


def _matches(layer: AttentionLayer, key: int | str) -> bool:
    return fnmatch.fnmatch(layer.name, key) if isinstance(key, str) else layer.index == key


def _check_known(name: str, key: int | str, found: list[AttentionLayer]) -> None:
    if not isinstance(key, str):
        checked_size(f"an index in {name}", key, at_least=0)
    if any(_matches(layer, key) for layer in found):
        return
    indices = sorted({layer.index for layer in found if layer.index is not None})
    raise ValueError(
        f"{name} names {key!r}, which the model does not have; it has the layers"
        f" {indices[0]} to {indices[-1]}, with modules such as {found[0].name!r}."
        if indices
        else f"{name} names {key!r}, which the model does not have; it has {found[0].name!r}."
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
