"""A `HeadMixing` that knows how its Hugging Face layer calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from iha.call import Causality
from iha.modules import HeadMixing
from iha.rotary import Phase, RopeMode, RotaryConvention, phase_tables


class LayerMixing(HeadMixing):
    """The mixing tensors of one attention module of a model, with the layer's settings.

    `rotary_module` is the model's own, whose `inv_freq` gives the phases. It is held without being
    a submodule: it belongs to the model, and it may be filled after this layer is built.
    """

    def __init__(
        self,
        *sizes: int,
        causal: Causality,
        window: int | None,
        rope: RopeMode,
        rotary: RotaryConvention,
        rotary_module: nn.Module | None,
        backend: str,
        **arguments: Any,
    ) -> None:
        super().__init__(*sizes, **arguments)
        self.causal: Causality = causal
        self.rope: RopeMode = rope
        self.window, self.backend = window, backend
        self.rotary: RotaryConvention = rotary
        self._rotary_module = (rotary_module,)

    def phase(self) -> Phase | None:
        rotary = self._rotary_module[0]
        if rotary is None or self.rope == "token":
            return None
        return phase_tables(self.pseudo_heads, _inverse_frequencies(rotary), self.rope)

    def rotate_as_virtual(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook: hand the attention module the rotary tables of positions n·P."""
        rotary, positions = self._rotary_module[0], kwargs.get("position_ids")
        if rotary is None:
            return args, kwargs
        if "position_embeddings" not in kwargs or positions is None:
            raise ValueError(
                f"rope='virtual' needs {type(module).__name__} to be given position_embeddings and"
                " position_ids, which this architecture does not do; use rope='fractional'."
            )
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        tables = rotary(states, positions * self.pseudo_heads)
        return args, {**kwargs, "position_embeddings": tables}


def find_rotary(model: nn.Module, rope: RopeMode) -> nn.Module | None:
    """The model's one rotary module, where `rope` needs it."""
    if rope == "token":
        return None
    found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(found) != 1:
        raise ValueError(
            f"rope={rope!r} needs a model with one rotary module that has inv_freq, and"
            f" {type(model).__name__} has {len(found)}; use rope='token'."
        )
    kind = getattr(found[0], "rope_type", "default")
    if "dynamic" in kind or kind == "longrope":
        raise ValueError(
            f"rope={rope!r} needs frequencies that are fixed per model, and this one's"
            f" ({kind}) change with the length of the input; use rope='token'."
        )
    return found[0]


def rotary_convention(rotary: nn.Module | None) -> RotaryConvention:
    """Which dimensions the model's tables pair, read off the tables."""
    if rotary is None:
        return "half"
    frequencies = _inverse_frequencies(rotary)
    positions = torch.ones(1, 1, dtype=torch.long, device=frequencies.device)
    cos = rotary(frequencies.new_zeros(1, 1, 1), positions)[0]
    if cos.is_complex() or cos.shape[-1] != 2 * frequencies.numel():
        return "pairs"
    first, second = cos.chunk(2, -1)
    return "half" if torch.equal(first, second) else "pairs"


def _inverse_frequencies(rotary: nn.Module) -> Tensor:
    frequencies = rotary.inv_freq
    assert isinstance(frequencies, Tensor)
    return frequencies
