"""Put IHA into a model, say so in its config, and put it in again when the model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from torch import nn
from transformers import PreTrainedModel

from iha.call import Causality
from iha.dispatch import check_backend
from iha.hf.attention import NAME
from iha.hf.attention_modules import AttentionLayer, attention_layers, chosen_layers
from iha.hf.layer_settings import (
    LayerSettings,
    RotaryOf,
    find_rotary,
    rotary_convention,
    rotate_as_virtual,
)
from iha.hf.model_class import auto_classes, edition_of
from iha.modules import HeadMixing
from iha.modules.head_mixing import Init
from iha.rotary import RopeMode, RotaryConvention


def upcycle(
    model: Any,
    pseudo_heads: int | Mapping[int | str, int],
    layers: Iterable[int | str] | None = None,
    *,
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
    conditions are in docs/design.md). What was done is recorded in `model.config.iha`, so that
    `save_pretrained` and, after `import iha.hf`, `from_pretrained` simply work.

    Args:
        model: any model whose attention goes through transformers' attention interface.
        pseudo_heads: P, or a mapping from layer to P; a mapping also chooses the layers.
        layers: indices, or patterns of module names such as "decoder.*.self_attn". Default: all.
            The other layers keep their attention.
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
    if getattr(model.config, "iha", None) is not None:
        raise ValueError(
            "model is already upcycled (model.config.iha is set); load the original checkpoint to"
            " upcycle it differently."
        )
    for name, given, allowed in (
        ("rope", rope, get_args(RopeMode)),
        ("causal", causal, get_args(Causality)),
        ("init", init, get_args(Init)),
    ):
        if given not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {given!r}.")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, or None; got {window}.")
    check_backend(backend)
    chosen = chosen_layers(model, layers, pseudo_heads)
    modules = {layer.name: layer for layer in attention_layers(model)}
    rotary: RotaryConvention = "half"
    if find_rotary(model, rope) is not None:
        rotary = rotary_convention(modules[next(iter(chosen))].module)
    model.config.iha = {
        "pseudo_heads": chosen,
        "rope": rope,
        "rotary": rotary,
        "causal": causal,
        "window": window,
        "per_head_collapse": per_head_collapse,
        "init": init,
        "backend": backend,
    }
    restore(model, value_noise=value_noise, query_noise=query_noise)
    return model


def restore(model: Any, **noise: float) -> None:
    """Attach what `model.config.iha` describes; nothing where it describes nothing."""
    settings: dict[str, Any] | None = getattr(model.config, "iha", None)
    if settings is None:
        return
    rotary = find_rotary(model, settings["rope"])
    for layer in attention_layers(model):
        if layer.name in settings["pseudo_heads"] and not hasattr(layer.module, "head_mixing"):
            _attach(model, layer, settings, rotary, noise)
    model.set_attn_implementation(NAME)
    # The base model too, which may be saved by itself.
    for part in (model.base_model, model):
        part.__class__ = edition_of(type(part))
    model.config.auto_map = {
        auto: f"modeling_iha.{type(model).__name__}" for auto in auto_classes(type(model).__name__)
    }


def _attach(
    model: Any,
    layer: AttentionLayer,
    settings: dict[str, Any],
    rotary: RotaryOf | None,
    noise: dict[str, float],
) -> None:
    # A layer without positions of its own (SmolLM3 has some) has no phases either.
    positions = rotary if getattr(layer.module, "use_rope", True) else None
    like = next((p for p in layer.module.parameters() if p.is_floating_point()), None)
    pseudo_heads: int = settings["pseudo_heads"][layer.name]
    module: Any = layer.module
    module.head_mixing = HeadMixing(
        layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        pseudo_heads=pseudo_heads,
        init=settings["init"],
        per_head_collapse=settings["per_head_collapse"],
        device=None if like is None else like.device,
        dtype=model.dtype if like is None else like.dtype,
        **noise,
    )
    module.iha = LayerSettings(
        pseudo_heads,
        positions=positions,
        **{name: settings[name] for name in ("causal", "window", "rope", "rotary", "backend")},
    )
    module.register_forward_pre_hook(_refuse_other_attention)
    if settings["rope"] == "virtual" and positions is not None:
        module.register_forward_pre_hook(rotate_as_virtual, with_kwargs=True)


def _refuse_other_attention(module: Any, args: object) -> None:
    if module.config._attn_implementation != NAME:
        raise ValueError(
            f"the model's attention was set to {module.config._attn_implementation!r}, which would"
            f" leave its mixing tensors out; call model.set_attn_implementation({NAME!r})."
        )


def mixing_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The mixing tensors of all layers, for an optimizer group of their own.

    PEFT trains and saves them beside an adapter with `modules_to_save=["head_mixing"]`; then both
    the frozen originals and the copies that train are among them.

    Raises ValueError if the model has none.
    """
    mixings = (module for module in model.modules() if isinstance(module, HeadMixing))
    parameters = [p for mixing in mixings for p in mixing.parameters()]
    if not parameters:
        raise ValueError("model has no mixing tensors; upcycle it first (iha.upcycle).")
    return parameters
