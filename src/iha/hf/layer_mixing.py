"""A `HeadMixing` that knows how its Hugging Face layer calls it."""

from __future__ import annotations

import inspect
import sys
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
        # A copy of this layer alone (PEFT makes one) holds a copy of the rotary module, which no
        # `model.to(device)` reaches.
        frequencies = _inverse_frequencies(rotary).to(self.alpha_q.device)
        return phase_tables(self.pseudo_heads, frequencies, self.rope)

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


def _inverse_frequencies(rotary: nn.Module) -> Tensor:
    frequencies = rotary.inv_freq
    assert isinstance(frequencies, Tensor)
    return frequencies
