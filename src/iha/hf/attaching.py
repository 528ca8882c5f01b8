"""Put mixing tensors and settings on the attention modules that an entry names."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from iha.hf.attention import ENGINES, NAME
from iha.hf.attention_modules import AttentionLayer, attention_layers
from iha.hf.entry import Entry
from iha.hf.layer_settings import LayerSettings, RotaryOf, find_rotary, rotate_as_virtual
from iha.modules import HeadMixing


def parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The model, and each model inside it that has a config of its own (a VLM's text model)."""
    found: dict[int, PreTrainedModel] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            found.setdefault(id(module.config), module)
    return list(found.values())


def attach(model: PreTrainedModel, entry: Entry, **noise: float) -> None:
    """Give each layer that the entry names what it lacks: mixing tensors, settings, hooks.

    Where the model is not the one of the entry but a part of it (a decoder alone), its layers are
    those that it has. Raises ValueError if the entry names a layer that its own model lacks.
    """
    layers = {layer.name: layer for layer in attention_layers(model)}
    unknown = [name for name in entry.pseudo_heads if name not in layers]
    if unknown and type(model.base_model).__name__ == entry.base_model:
        raise ValueError(
            f"the entry 'iha' of config.json names the layer {unknown[0]!r}, which"
            f" {entry.base_model} does not have; restore the file."
        )
    rotary = find_rotary(model, entry.rope)
    for name in entry.pseudo_heads:
        if name in layers and not hasattr(layers[name].module, "head_mixing"):
            _attach(model, layers[name], entry, rotary, noise)


def _attach(
    model: PreTrainedModel,
    layer: AttentionLayer,
    entry: Entry,
    rotary: RotaryOf | None,
    noise: dict[str, float],
) -> None:
    module: Any = layer.module
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    hook = getattr(module, "_hf_hook", None)  # accelerate's: what it offloads is on "meta"
    device = getattr(hook, "execution_device", None)
    if device is None and like is not None:
        device = like.device
    module.head_mixing = HeadMixing(
        layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        pseudo_heads=entry.pseudo_heads[layer.name],
        init=entry.init,
        per_head_collapse=entry.per_head_collapse,
        device=device,
        dtype=model.dtype if like is None else like.dtype,
        **noise,
    )
    positions = None if layer.name in entry.unrotated else rotary
    module.iha = LayerSettings(
        pseudo_heads=entry.pseudo_heads[layer.name],
        causal=entry.causal,
        window=entry.window,
        rope=entry.rope,
        rotary=entry.rotary,
        positions=positions,
        backend=entry.backend,
    )
    module.register_forward_pre_hook(_refuse_other_attention)
    if entry.rope == "virtual" and positions is not None:
        module.register_forward_pre_hook(rotate_as_virtual, with_kwargs=True)


def _refuse_other_attention(module: Any, args: object) -> None:
    if module.config._attn_implementation not in (NAME, *ENGINES):
        raise ValueError(
            f"the model's attention was set to {module.config._attn_implementation!r}, which would"
            f" leave its mixing tensors out; call model.set_attn_implementation({NAME!r})."
        )
