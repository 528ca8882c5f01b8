"""How a Hugging Face layer calls its mixing tensors, and where the model keeps its positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from iha.call import Causality
from iha.rotary import Phase, RopeMode, RotaryConvention, phase_tables


class RotaryOf:
    """Where a model keeps its rotary module, looked up at each call.

    So a rotary module that takes the place of the first is the one that counts. The owner belongs
    to the model: held here without being a submodule, and shared by a copy of one layer alone.
    `kind` is the layer type in a module that has frequencies for each (Gemma 3, OLMo 3).
    """

    def __init__(self, owner: nn.Module, name: str, kind: str | None = None) -> None:
        self._owner, self._name, self.kind = owner, name, kind
        self.buffer = "inv_freq" if kind is None else f"{kind}_inv_freq"

    def __call__(self) -> nn.Module:
        return getattr(self._owner, self._name)

    def __deepcopy__(self, memo: dict[int, Any]) -> RotaryOf:
        return RotaryOf(memo.get(id(self._owner), self._owner), self._name, self.kind)

    def tables(self, states: Tensor, positions: Tensor, module: nn.Module | None = None) -> Any:
        """What the module, or `module` in its place, makes of positions."""
        module = self() if module is None else module
        return module(states, positions, *(() if self.kind is None else (self.kind,)))

    def frequencies(self, device: torch.device) -> Tensor:
        rotary = self()
        frequencies, hook = getattr(rotary, self.buffer), getattr(rotary, "_hf_hook", None)
        if not frequencies.is_meta or hook is None:
            return frequencies.to(device)
        hook.pre_forward(rotary)  # accelerate has offloaded it, as parameters
        frequencies = getattr(rotary, self.buffer).to(device)
        hook.post_forward(rotary, None)
        return frequencies


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """What `config.iha` says of one attention module: `module.iha`, beside `module.head_mixing`.

    It is not on the mixing itself, which PEFT and others wrap or replace by a copy. `positions` is
    None where the layer has no rotation of its own, and so no phases.
    """

    num_heads: int
    num_kv_heads: int
    pseudo_heads: int
    causal: Causality
    window: int | None
    rope: RopeMode
    rotary: RotaryConvention
    rotary_start: int
    positions: RotaryOf | None
    backend: str

    def phase(self, device: torch.device) -> Phase | None:
        """The `phase` argument of the operator, for queries and keys that are `aligned`."""
        if self.positions is None or self.rope == "token":
            return None
        return phase_tables(self.pseudo_heads, self.positions.frequencies(device), self.rope)

    def aligned(self, *heads: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys with the dimensions first that the operator turns, if it turns any.

        Scores do not depend on the order of dimensions.
        """
        if self.positions is None or not self.rotary_start:
            return heads
        return tuple(tensor.roll(-self.rotary_start, -1) for tensor in heads)


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
    tables = settings.positions.tables(states, positions * settings.pseudo_heads)
    return args, {**kwargs, "position_embeddings": tables}
