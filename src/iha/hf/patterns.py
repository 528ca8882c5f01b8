"""The attention weights of a Hugging Face model on an input."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import torch

from iha.checks import checked_size
from iha.hf.attaching import parts
from iha.hf.attention import NAME
from iha.hf.attention_modules import AttentionLayer, attention_layers, matching
from iha.patterns import AttentionPattern


@torch.no_grad()
def attention_patterns(
    model: Any,
    inputs: Mapping[str, Any],
    layers: Iterable[int | str] | None = None,
    heads: Iterable[int] | None = None,
) -> dict[str, AttentionPattern]:
    """Name of each attention module → where its heads look, on `model(**inputs)`.

        inputs = tokenizer(text, return_tensors="pt")
        (pattern,) = iha.attention_patterns(model, inputs, layers=[3]).values()
        pattern.pairs   # (B, h, N, Pq, S, P): each pseudo-query over all pseudo-keys
        pattern.tokens  # (B, h, N, S): as `output_attentions=True` gives them

    The weights are those of the definition (arXiv 2602.21371, section 3), in at least float32 and
    without dropout; layers and models without IHA give their own. The model keeps its mode: call
    `model.eval()` first. PEFT's and `torch.compile`'s wrappers may be around it.

    Args:
        model, inputs: a model, upcycled or plain, and its keyword arguments.
        layers: indices, or patterns of module names, as in `iha.upcycle`. Default: all, but for
            those that these inputs do not reach.
        heads: which query heads, in this order. Default: all.

    Raises TypeError or ValueError, with the argument's name, for layers or heads that the model
    does not have, and for a layer that runs more than once in a call (it is shared).
    """
    model = getattr(model, "_orig_mod", model)
    found = matching(attention_layers(model), layers)
    heads = None if heads is None else list(heads)
    chosen = {layer.name: _checked_heads(layer, heads) for layer in found}
    with _recorded(model, found):
        model(**inputs)
        seen = {layer.name: vars(layer.module)["attention_seen"] for layer in found}
    for name, sources in seen.items():
        if len(sources) > 1:
            raise ValueError(
                f"layers has {name!r}, which ran {len(sources)} times in one call of the model,"
                " each time with weights of its own; give inputs that run it once, or leave it out."
            )
    return {n: AttentionPattern(s[0], chosen[n]) for n, s in seen.items() if s}


def _checked_heads(layer: AttentionLayer, heads: Iterable[int] | None) -> list[int]:
    most = layer.num_heads - 1
    heads = range(most + 1) if heads is None else heads
    return [checked_size("heads", h, at_least=0, at_most=most) for h in heads]


@contextlib.contextmanager
def _recorded(model: Any, layers: list[AttentionLayer]) -> Generator[None]:
    """Let the attention function write down what it is called with, on each of these modules."""
    modules: list[Any] = [*parts(model), *(layer.module for layer in layers)]
    configs = {id(module.config): module.config for module in modules}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for layer in layers:
        vars(layer.module)["attention_seen"] = []
    for config in configs.values():
        config._attn_implementation_internal = NAME
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for layer in layers:
            del vars(layer.module)["attention_seen"]
