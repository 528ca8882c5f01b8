"""How a Hugging Face layer calls its mixing tensors, and where the model keeps its positions."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from iha.call import Causality
from iha.rotary import Phase, RopeMode, RotaryConvention, phase_tables


class RotaryOf:
    """Where a model keeps its rotary module, looked up at each call.

    So a rotary module that takes the place of the first is the one that counts. The owner belongs
    to the model: held here without being a submodule, and shared by a copy of one layer alone.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self._owner, self._name = owner, name

    def __call__(self) -> nn.Module:
        return getattr(self._owner, self._name)

    def __deepcopy__(self, memo: dict[int, Any]) -> RotaryOf:
        return RotaryOf(memo.get(id(self._owner), self._owner), self._name)


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """What `config.iha` says of one attention module: `module.iha`, beside `module.head_mixing`.

    It is not on the mixing itself, which PEFT and others wrap or replace by a copy. `positions` is
    None where the layer has no rotation of its own, and so no phases.
    """

    pseudo_heads: int
    causal: Causality
    window: int | None
    rope: RopeMode
    rotary: RotaryConvention
    positions: RotaryOf | None
    backend: str

    def phase(self, device: torch.device) -> Phase | None:
        """The `phase` argument of the operator."""
        if self.positions is None or self.rope == "token":
            return None
        frequencies = self.positions().inv_freq
        assert isinstance(frequencies, Tensor)
        return phase_tables(self.pseudo_heads, frequencies.to(device), self.rope)


def rotate_as_virtual(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: hand the attention module the rotary tables of positions n·P."""
    settings: LayerSettings = module.iha
    positions = kwargs.get("position_ids")
    if settings.positions is None:
        return args, kwargs
    if "position_embeddings" not in kwargs or positions is None:
        raise ValueError(
            f"rope='virtual' needs {type(module).__name__} to be given position_embeddings and"
            " position_ids, which this architecture does not do; use rope='fractional'."
        )
    states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    tables = settings.positions()(states, positions * settings.pseudo_heads)
    return args, {**kwargs, "position_embeddings": tables}


def find_rotary(model: nn.Module, rope: RopeMode) -> RotaryOf | None:
    """The model's one rotary module, where `rope` needs it."""
    if rope == "token":
        return None
    found = [
        RotaryOf(owner, name)
        for owner in model.modules()
        for name, module in owner.named_children()
        if isinstance(getattr(module, "inv_freq", None), Tensor)
    ]
    if len(found) != 1:
        raise ValueError(
            f"rope={rope!r} needs a model with one rotary module that has inv_freq, and"
            f" {type(model).__name__} has {len(found)}; use rope='token'."
        )
    kind = getattr(found[0](), "rope_type", "default")
    if "dynamic" in kind or kind == "longrope":
        raise ValueError(
            f"rope={rope!r} needs frequencies that are fixed per model, and this one's"
            f" ({kind}) change with the length of the input; use rope='token'."
        )
    return found[0]


def rotary_convention(attention: nn.Module) -> RotaryConvention:
    """Which dimensions the model pairs, asked of the function with which its attention rotates.

    The tables do not say it: some models (GLM-4) lay them out by halves and pair neighbours.
    """
    functions = vars(sys.modules[type(attention).__module__])
    rotate = functions.get("apply_rotary_pos_emb") or functions.get("apply_rotary_emb")
    if rotate is None:
        raise ValueError(
            f"it is not known which dimensions {type(attention).__name__} rotates together, since"
            " its file has no apply_rotary_pos_emb; use rope='token'."
        )
    # Turn the first of four dimensions by one radian: its partner is where something appears.
    angle = torch.ones(1, 1, 4)
    tables = {"cos": angle.cos(), "sin": angle.sin()}
    tables["freqs_cis"] = torch.polar(angle, angle)[..., :2]
    first = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    required = (
        name
        for name, parameter in inspect.signature(rotate).parameters.items()
        if parameter.default is parameter.empty
    )
    turned = rotate(*(tables.get(name, first) for name in required))
    turned = turned if isinstance(turned, Tensor) else turned[0]
    return "half" if turned.flatten()[2] != 0 else "pairs"
