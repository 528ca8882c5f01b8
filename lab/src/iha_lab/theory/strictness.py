"""MHA ≠ IHA: on repeated tokens every MHA layer is linear, and one with P = 2 is not.

Let all N tokens be the same x. In an MHA head all scores of a query are equal, so whatever is
visible has equal weights, and the output is x W_V, linear in x.

With P = 2 take pseudo-keys ±K and pseudo-values ±V, and select the last pseudo-query, Q. The
visible pairs are equally many with key +k and with -k, also under flat causality. So with
s = scale · ⟨x W_Q, x W_K⟩

    O = (e^s v - e^-s v) / (e^s + e^-s) = tanh(s) v,    v = x W_V,

for one dimension and weights 1: tanh(x²)·x, whereas MHA has x.

This has to differ from the paper's appendix B.1 in one sign. Printed there are pseudo-values +V
and +V; their weighted mean is v whatever the weights are, so on repeated tokens that layer is as
linear as MHA. With -V for the second it is the difference of softmax terms that the paper's section
4.1 speaks of.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from iha.call import Causality
from iha_lab.theory.finding import Finding, Findings
from iha_lab.theory.layer import Layer, Mixing, random

LINEAR, NONLINEAR = 1e-12, 0.1
N, E, H, D = 5, 6, 3, 4
MASKS: dict[str, Causality | None] = {"no mask": None, "flat causality": "flat"}


@dataclasses.dataclass(frozen=True)
class Curves:
    """Outputs on repeated tokens of one dimension, over x, under flat causality."""

    x: Float[Tensor, " points"]
    mha: Float[Tensor, " points"]
    iha: Float[Tensor, " points"]
    printed: Float[Tensor, " points"]


def findings() -> list[Finding]:
    found: list[Finding] = []
    for name, causal in MASKS.items():
        sizes = f"{name}, H={H}, N={N}"
        rows = Findings(f"{sizes}, P=2", "|f(x + y) - f(x) - f(y)|, relative")
        worst = max(nonlinearity(layer(None, seed), causal) for seed in range(20))
        claim = "every MHA layer is linear on repeated tokens"
        rows.at_most(LINEAR, worst, claim, setting=f"{sizes}, 20 random layers")
        worst = max(nonlinearity(layer(one(seed), seed), causal) for seed in range(20))
        claim = "so is IHA with one pseudo-head"
        rows.at_most(LINEAR, worst, claim, setting=f"{sizes}, P=1, 20 random mixings")
        deviation = nonlinearity(layer(signs(H, -1.0), 0), causal)
        rows.at_least(NONLINEAR, deviation, "IHA is not: pseudo-keys ±K, pseudo-values ±V")
        rows.at_most(
            LINEAR,
            formula_error(causal),
            "… and is tanh(x²)·x in one dimension",
            setting=f"{name}, H=1, P=2",
            computed="largest difference from tanh(x²)·x",
        )
        rows.at_least(
            NONLINEAR,
            nonlinearity(layer(signs(H, 1.0), 0), causal),
            "IHA is not, with the parameters as printed in B.1: ±K, values (+V, +V)",
            remark="Equal pseudo-values have the mean v under any weights; ±V is what makes it"
            " nonlinear.",
        )
        found += rows
    return found


def signs(heads: int, second_value: float) -> Mixing:
    """Make pseudo-keys (K, -K), -values (V, `second_value`·V), -queries (-Q, Q); Q is selected.

    The paper numbers them the other way round and selects the first. Without a mask that is the
    same; with flat causality only the last sees both keys of its own token.
    """
    eye = torch.eye(heads, dtype=torch.float64)[..., None]
    pairs = ((-1.0, 1.0), (1.0, -1.0), (1.0, second_value), (0.0, 1.0))
    return Mixing(*(eye * torch.tensor(pair, dtype=torch.float64) for pair in pairs))


def one(seed: int) -> Mixing:
    """Make one pseudo-head, mixed at random from all heads."""
    seeded = torch.Generator().manual_seed(seed)
    return Mixing(*(random(seeded, H, H, 1) for _ in range(4)))


def layer(mixing: Mixing | None, seed: int) -> Layer:
    seeded = torch.Generator().manual_seed(seed)
    return Layer(*(random(seeded, H, E, D) / E**0.5 for _ in range(3)), mixing=mixing)


def repeated(
    layer: Layer, x: Float[Tensor, "B E"], causal: Causality | None
) -> Float[Tensor, "B N Hm"]:
    """Run the layer on N tokens that all are x."""
    return layer.attend(x[:, None].expand(-1, N, -1), causal=causal, scale=1.0)


def nonlinearity(layer: Layer, causal: Causality | None) -> float:
    """Take the largest |f(x + y) - f(x) - f(y)| over random x, y, relative to the largest |f|."""
    x, y = random(torch.Generator().manual_seed(1), 2, 50, layer.w_q.shape[1])
    both, first, second = (repeated(layer, tokens, causal) for tokens in (x + y, x, y))
    return float((both - first - second).abs().max() / both.abs().max())


def formula_error(causal: Causality | None) -> float:
    x = _grid()
    out = repeated(_scalar(signs(1, -1.0)), x[:, None], causal)
    return float((out[..., 0] - (torch.tanh(x**2) * x)[:, None]).abs().max())


def curves() -> Curves:
    x = _grid()
    mixings = (None, signs(1, -1.0), signs(1, 1.0))
    outputs = (repeated(_scalar(mixing), x[:, None], "flat")[:, -1, 0] for mixing in mixings)
    return Curves(x, *outputs)


def _grid() -> Float[Tensor, " points"]:
    return torch.linspace(-2, 2, 81, dtype=torch.float64)


def _scalar(mixing: Mixing | None) -> Layer:
    weight = torch.ones(1, 1, 1, dtype=torch.float64)
    return Layer(weight, weight, weight, mixing)
