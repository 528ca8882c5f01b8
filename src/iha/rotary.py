"""Rotary tables, for tokens and for pseudo-heads.

All heads of a token turn by the same angle and mixing is linear over heads, so mixing commutes with
the token's rotation: queries and keys are rotated as in any model, and a pseudo-head only needs the
small further rotation of its `phase`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Real

Phase = tuple["Float[Tensor, '*P r']", "Float[Tensor, '*P r']"]
RotaryConvention = Literal["half", "pairs"]
RopeMode = Literal["token", "virtual", "fractional"]


def inverse_frequencies(
    width: int, base: float = 10000.0, device: torch.device | str | None = None
) -> Float[Tensor, " r"]:
    """θ_i = base^(-2i/width) for i = 0 … width/2 - 1 (Su et al., arXiv 2104.09864), in float32."""
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    return base**-exponents


def rotary_tables(
    positions: Real[Tensor, "*s"], inv_freq: Float[Tensor, " r"], *, stride: int = 1
) -> Phase:
    """(cos, sin) of stride · position · θ_i, each (*s, r) in float32; virtual: `stride` = P."""
    angles = positions[..., None].float() * stride * inv_freq.float()
    return angles.cos(), angles.sin()


def phase_tables(
    pseudo_heads: int, inv_freq: Float[Tensor, " r"], mode: RopeMode, *, clockwise: bool = False
) -> Phase | None:
    """The `phase` argument of `iha.interleaved_head_attention`, each table (P, r).

    | `mode`         | the model rotates token n by | `phase` of pseudo-head p |
    |----------------|------------------------------|--------------------------|
    | `"token"`      | position n                   | none                     |
    | `"virtual"`    | position n·P                 | position p               |
    | `"fractional"` | position n                   | position p / P           |

    `inv_freq` are the frequencies that the model attends with, scaled ones where it scales them.
    `clockwise` is for a model that rotates by -θ, (x·cos + y·sin, y·cos - x·sin), as nanochat does:
    the phase must turn the same way, which the operator cannot see.
    """
    steps = {"token": 0.0, "virtual": 1.0, "fractional": 1 / pseudo_heads}
    if mode not in steps:
        raise ValueError(f"mode must be one of {', '.join(map(repr, steps))}; got {mode!r}.")
    step = -steps[mode] if clockwise else steps[mode]
    positions = torch.arange(pseudo_heads, device=inv_freq.device) * step
    return rotary_tables(positions, inv_freq) if step else None


def rotate(
    heads: Float[Tensor, "*batch N d"], tables: Phase, convention: RotaryConvention
) -> Float[Tensor, "*batch N d"]:
    """Rotate the first 2r dimensions by tables that broadcast to (*batch, N, r).

    "half" pairs dimension i with i + r (Llama, NeoX), "pairs" pairs 2i with 2i + 1 (GPT-J).
    """
    cos, sin = (table.to(heads.dtype) for table in tables)
    width = 2 * cos.shape[-1]
    x, rest = heads[..., :width], heads[..., width:]
    first, second = x.chunk(2, -1) if convention == "half" else (x[..., 0::2], x[..., 1::2])
    rotated = (first * cos - second * sin, second * cos + first * sin)
    x = torch.cat(rotated, -1) if convention == "half" else torch.stack(rotated, -1).flatten(-2)
    return torch.cat((x, rest), -1) if rest.shape[-1] else x
