"""Where a model keeps its rotary module, and what its attention turns with it: by what it does."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from iha.hf.attention_modules import AttentionLayer, attention_layers
from iha.hf.layer_settings import RotaryOf
from iha.rotary import RopeMode, RotaryConvention, rotary_tables, rotate

_ASKED = "iha, while it asks what an attention module rotates"


class Rotation(NamedTuple):
    """Which dimensions of a head turn together, and the first of them."""

    convention: RotaryConvention = "half"
    start: int = 0


def find_rotary(model: Any, layer: str) -> RotaryOf:
    """The rotary module that is nearest to an attention module, on the way up from it.

    Raises ValueError if there is none, or none with frequencies that are fixed.
    """
    path, attention = layer, model.base_model.get_submodule(layer)
    types = getattr(getattr(attention, "config", None), "layer_types", None)
    kind = None if types is None else types[getattr(attention, "layer_idx", 0)]
    while True:
        owner = model.base_model.get_submodule(path)
        candidates = (
            RotaryOf(owner, n, k) for n, _ in owner.named_children() for k in {None, kind}
        )
        found = [of for of in candidates if isinstance(getattr(of(), of.buffer, None), Tensor)]
        if found or not path:
            break
        path = path.rpartition(".")[0]
    if len(found) != 1:
        raise ValueError(
            f"needs one rotary module that has inv_freq for {layer!r}, and {type(model).__name__}"
            f" has {len(found)}; use rope='token'."
        )
    scaling: Any = getattr(found[0](), "rope_type", "default")
    scaling = scaling[kind] if isinstance(scaling, dict) else scaling
    if "dynamic" in scaling or scaling == "longrope":
        raise ValueError(
            f"needs frequencies that are fixed per model, and this one's ({scaling}) change with"
            " the length of the input; use rope='token'."
        )
    return found[0]


def find_rotations(model: Any, names: Iterable[str], rope: RopeMode) -> tuple[Rotation, list[str]]:
    """What the attention modules rotate, and those of them that rotate nothing.

    Raises ValueError where phases of `rope` could not be what the model itself would do.
    """
    if rope == "token":
        return Rotation(), []
    layers = {layer.name: layer for layer in attention_layers(model)}
    weights: dict[Any, Tensor] = {}
    found: dict[str, Rotation | None] = {}
    try:
        for name in names:
            rotary = find_rotary(model, name)
            with torch.device("cpu"):
                found[name] = _rotation(layers[name], rotary, model.dtype, weights)
        kinds = {rotation for rotation in found.values() if rotation is not None}
        if len(kinds) > 1:
            raise ValueError(
                "needs all layers to rotate the same dimensions, which"
                f" {type(model).__name__} does not; use rope='token'."
            )
    except ValueError as error:
        raise ValueError(f"rope={rope!r} {error}") from error.__cause__
    unrotated = [name for name, rotation in found.items() if rotation is None]
    return next(iter(kinds), Rotation()), unrotated


@torch.no_grad()
def _rotation(
    layer: AttentionLayer, rotary: RotaryOf, dtype: torch.dtype, weights: dict[Any, Tensor]
) -> Rotation | None:
    """Ask the module for its queries and keys of the same tokens, one position apart.

    A phase is right if it takes the ones to the others. None if they are the same. Call it under
    `torch.device("cpu")`: a model may be upcycled where everything new is on the meta device.
    """
    what = f"{layer.name!r} ({type(layer.module).__name__})"
    angles = torch.linspace(0.4, 1.9, getattr(rotary(), rotary.buffer).numel())
    try:
        here, there = (_rotated(layer.module, rotary, angles, n, dtype, weights) for n in (0, 1))
    except Exception as error:
        raise ValueError(
            f"needs to know which dimensions {what} rotates, and it cannot be asked"
            f" ({type(error).__name__}: {error}); use rope='token'."
        ) from error
    tolerance = 1e-3 if here[0].dtype == torch.float32 else 3e-2
    differences = [
        (b - a).abs().amax((0, 1, 2)) / a.abs().max() for a, b in zip(here, there, strict=True)
    ]
    moved = torch.stack(differences) > tolerance
    if not moved.any():
        return None
    start, width = int(moved.any(0).nonzero()[0]), 2 * len(angles)
    phase = rotary_tables(torch.ones(1), angles)
    for convention in get_args(RotaryConvention):
        right = start + width <= moved.shape[1]
        for a, b in zip(here, there, strict=True):
            expected = a.float().clone()
            if right:
                turned = rotate(expected[..., start:], phase, convention)
                expected[..., start:] = turned
            right &= bool((expected - b.float()).abs().max() <= tolerance * a.abs().max())
        if right:
            return Rotation(convention, start)
    raise ValueError(
        f"needs queries and keys that a rotation takes from one position to the next, and those of"
        f" {what} are no such; use rope='token'."
    )


def _rotated(
    attention: nn.Module,
    rotary: RotaryOf,
    angles: Tensor,
    shift: int,
    dtype: torch.dtype,
    weights: dict[Any, Tensor],
) -> tuple[Tensor, Tensor]:
    """(query, key) that the module hands to its attention function, for positions from `shift`.

    `angles` stand in for the frequencies, so that every dimension moves; `weights` for parameters
    on the meta device, for all layers of one shape.
    """
    config: Any = attention.config
    offloaded = any(hasattr(module, "_hf_hook") for module in attention.modules())
    meta = {n: p for n, p in attention.state_dict(keep_vars=True).items() if p.is_meta}
    if offloaded:
        meta = {}
    like = next((p for p in attention.parameters() if not p.is_meta), torch.empty(0))
    device, dtype = like.device, torch.float32 if meta else dtype
    for name, parameter in meta.items():
        shape = parameter.shape
        if (name, shape) not in weights:
            random = torch.Generator().manual_seed(0)
            weights[name, shape] = (
                torch.randn(shape, generator=random) if len(shape) > 1 else torch.ones(shape)
            )
    seen: list[tuple[Tensor, Tensor]] = []

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any):
        seen.append((query, key))
        B, H, N = query.shape[:3]
        return query.new_zeros(B, N, H, value.shape[-1]), None

    # Without accelerate's hooks, which would put back the frequencies.
    twin = copy.copy(rotary())
    buffers = dict(twin.named_buffers(recurse=False))
    twin.__dict__["_buffers"] = {**buffers, rotary.buffer: angles.to(device)}
    twin.__dict__["forward"] = functools.partial(type(twin).forward, twin)
    random = torch.Generator().manual_seed(1)
    states = torch.randn(1, 3, config.hidden_size, generator=random).to(device, dtype)
    positions = torch.tensor([[2, 3, 5]], device=device) + shift
    arguments: dict[str, Any] = {
        name: None
        for name, parameter in inspect.signature(attention.forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind == parameter.POSITIONAL_OR_KEYWORD
    }
    arguments |= {
        "hidden_states": states,
        "position_embeddings": rotary.tables(states, positions, twin),
    }
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_ASKED] = attend
    config._attn_implementation_internal = _ASKED
    try:
        if meta:
            stand_ins = {name: weights[name, parameter.shape] for name, parameter in meta.items()}
            torch.func.functional_call(attention, stand_ins, (), arguments)
        else:
            attention(**arguments)
    finally:
        config._attn_implementation_internal = before
        del ALL_ATTENTION_FUNCTIONS[_ASKED]
    ((query, key),) = seen
    return query.cpu(), key.cpu()
