"""The pictures of `iha lab theory`, each a figure of matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from iha_lab.report.figures import STYLE
from iha_lab.theory.filters import Count
from iha_lab.theory.patterns import Ranks
from iha_lab.theory.strictness import Curves


@matplotlib.rc_context(STYLE)
def strictness(curves: Curves) -> Figure:
    figure, (axis,) = _figure(1)
    axis.plot(curves.x, curves.mha, label="MHA, and IHA as printed in B.1", linewidth=1.5)
    axis.plot(curves.x, curves.iha, label="IHA, P = 2: keys ±K, values ±V", linewidth=1.5)
    axis.plot(curves.x[::4], curves.printed[::4], ".", color="C0", markersize=4)
    axis.plot(curves.x[::4], (curves.x.square().tanh() * curves.x)[::4], "+", color="C1")
    axis.text(1.1, 0.55, "+  tanh(x²)·x", color="C1")
    axis.set_xlabel("x, the same number at every token")
    axis.set_ylabel("output at the last token")
    axis.legend(frameon=False)
    return figure


@matplotlib.rc_context(STYLE)
def filters(counts: Sequence[Count], epsilons: Sequence[float], errors: Sequence[float]) -> Figure:
    """Parameters over k, and how the construction with softmax nears the linear one."""
    figure, (left, right) = _figure(2)
    orders = [count.k for count in counts]
    for name, counted, formula, colour in (
        ("MHA, k heads", [c.mha for c in counts], [c.mha_formula for c in counts], "C0"),
        ("IHA, ⌈√k⌉ heads", [c.iha for c in counts], [c.iha_formula for c in counts], "C1"),
    ):
        left.plot(orders, counted, "o", label=f"{name}, counted", color=colour, markersize=4)
        left.plot(orders, formula, label="the paper's formula", color=colour, linewidth=1)
    left.set_xlabel("k, length of the filter bank")
    left.set_ylabel("parameters")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    right.loglog(epsilons, errors, "o-", color="C1", markersize=4, linewidth=1, label="measured")
    squares = [errors[0] * (epsilon / epsilons[0]) ** 2 for epsilon in epsilons]
    right.loglog(epsilons, squares, "--", color="grey", linewidth=1, label="∝ ε²")
    right.set_ylim(bottom=min(errors) / 3)
    right.set_xlabel("ε, scale of the softmax")
    right.set_ylabel("error of the filter bank, relative")
    right.legend(frameon=False)
    return figure


@matplotlib.rc_context(STYLE)
def patterns(mha: Ranks, iha: Sequence[Ranks]) -> Figure:
    figure, (axis,) = _figure(1)
    P = [one.pseudo_heads for one in iha]
    axis.plot(P, [p**2 for p in P], color="grey", linewidth=1, label="P²")
    axis.plot(P, [one.head for one in iha], "o", color="C1", label="IHA head")
    scores = [one.head_scores for one in iha]
    axis.plot(P, scores, "x--", color="C2", linewidth=1, label="IHA head, scores before softmax")
    axis.plot(P, [mha.head] * len(P), "s", color="C0", markersize=4, label="MHA head")
    axis.set_xlabel("P, pseudo-heads")
    axis.set_ylabel("independent attention patterns")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    return figure


def _figure(columns: int) -> tuple[Figure, list[Any]]:
    """Without pyplot: no global figures to close, and PNG is drawn by Agg, without a display."""
    figure = Figure(figsize=(4.8 * columns, 3.2), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])
