"""Put mixing tensors and settings on the attention modules that an entry names."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from iha.hf.attention import check_called, hand_down_positions, prepare
from iha.hf.attention_modules import AttentionLayer, attention_layers, carries_a_state
from iha.hf.entry import Entry
from iha.hf.layer_settings import LayerSettings, rotate_as_virtual
from iha.hf.positions import find_rotary
from iha.modules import HeadMixing


class _Norm(nn.LayerNorm):
    """A LayerNorm to `isinstance` and to nothing else."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class LayerMixing(HeadMixing, _Norm):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A `HeadMixing` that does not decay.

    Weight decay would pull it to 0 and not to the identity. transformers' `Trainer`, and training
    code like it, asks the type of a module: LayerNorms are what it leaves alone.
    """


def parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The model, and each model inside it that has a config of its own (a VLM's text model)."""
    found: dict[int, PreTrainedModel] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            found.setdefault(id(module.config), module)
    return list(found.values())


# In a tensor-parallel plan: what shards heads → what gathers them before the mixing, which needs
# all, and splits them behind it. A norm of heads has its whole gradient then on each device.
_GATHERED = {
    "colwise": "colwise_gather_output",
    "rowwise": "rowwise_split_input",
    "replicated_with_grad_allreduce": None,
}


def gather_heads(model: Any) -> None:
    """Change the model's tensor-parallel plan for the attention modules that carry a mixing.

    transformers asks a plan for all layers alike, so all layers of a stack gather if one does.
    """
    mixed = {
        re.sub(r"\.\d+(?=\.)", ".*", f"{name}.")
        for name, module in model.named_modules()
        if hasattr(module, "head_mixing")
    }
    plan: dict[str, str] = model._tp_plan or {}
    for key in [key for key in plan if key.startswith(tuple(mixed))]:
        style = plan.pop(key)
        if (gathered := _GATHERED.get(style, style)) is not None:
            plan[key] = gathered


def attach(model: PreTrainedModel, entry: Entry, **noise: Any) -> None:
    """Give each layer that the entry names what it lacks: mixing tensors, settings, hooks.

    Where the model is not the one of the entry but a part of it (a decoder alone), its layers are
    those that it has. Raises ValueError if the entry is another model's, or names a layer that its
    own model lacks.
    """
    files = {cls.__module__ for cls in type(model).__mro__} - {"iha.hf.modeling_iha"}
    if not any(hasattr(sys.modules[file], entry.base_model) for file in files):
        raise ValueError(
            f"the entry 'iha' of config.json is of a {entry.base_model}, and the model's base is a"
            f" {type(model.base_model).__name__}; restore the file."
        )
    layers = {layer.name: layer for layer in attention_layers(model)}
    unknown = [name for name in entry.pseudo_heads if name not in layers]
    if unknown and type(model.base_model).__name__ == entry.base_model:
        raise ValueError(
            f"the entry 'iha' of config.json names the layer {unknown[0]!r}, which"
            f" {entry.base_model} does not have; restore the file."
        )
    for name in entry.pseudo_heads:
        if name in layers and not hasattr(layers[name].module, "head_mixing"):
            _attach(model, layers[name], entry, noise)
    for layer in layers.values():  # also those that keep their attention
        if prepare not in layer.module._forward_pre_hooks.values():  # pyright: ignore[reportPrivateUsage]
            layer.module.register_forward_pre_hook(prepare, with_kwargs=True)


def _attach(
    model: PreTrainedModel,
    layer: AttentionLayer,
    entry: Entry,
    noise: dict[str, Any],
) -> None:
    module: Any = layer.module
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    module.head_mixing = LayerMixing(
        layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        pseudo_heads=entry.pseudo_heads[layer.name],
        pseudo_queries=entry.pseudo_queries[layer.name],
        init=entry.init,
        per_head_collapse=entry.per_head_collapse,
        device=_device(module),
        # Wide in a model of half precision, see HeadMixing.
        dtype=torch.promote_types(model.dtype if like is None else like.dtype, torch.float32),
        **noise,
    )
    module.register_forward_hook(check_called)
    rotated = entry.rope != "token" and layer.name not in entry.unrotated
    module.iha = LayerSettings(
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        pseudo_heads=entry.pseudo_heads[layer.name],
        causal=entry.causal,
        window=entry.window,
        rope=entry.rope,
        rotary=entry.rotary,
        rotary_start=entry.rotary_start,
        positions=find_rotary(model, layer.name) if rotated else None,
        backend=entry.backend,
    )
    if entry.rope == "virtual" and rotated:
        module.register_forward_pre_hook(rotate_as_virtual, with_kwargs=True)
    _hand_down_positions(layer.part)


def _hand_down_positions(part: Any) -> None:
    taken = inspect.signature(part.forward).parameters
    anything = any(parameter.kind == parameter.VAR_KEYWORD for parameter in taken.values())
    if "position_ids" in taken and anything and not hasattr(part, "iha_arguments"):
        part.iha_arguments, part.iha_packs = list(taken), not carries_a_state(part)
        part.register_forward_pre_hook(hand_down_positions, with_kwargs=True)


def _device(module: nn.Module) -> torch.device | None:
    """Where the module runs: what accelerate offloads is on "meta" until then."""
    for inner in module.modules():
        hook: Any = getattr(inner, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    return next((p.device for p in module.parameters()), None)
