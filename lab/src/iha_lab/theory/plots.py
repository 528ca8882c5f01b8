"""The figures of `iha lab theory`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from iha_lab.report.figures import COLOURS, legend, panels
from iha_lab.theory.filters import Count
from iha_lab.theory.ranks import Ranks
from iha_lab.theory.strictness import Curves

MHA, IHA = COLOURS["mha"], COLOURS["iha"]
SMALL: Any = {"markersize": 4, "linewidth": 1}


def strictness(curves: Curves) -> Any:
    figure, ((axis,),) = panels(1, 1, 4.8, 3.2)
    axis.plot(curves.x, curves.mha, color=MHA, label="MHA", linewidth=3)
    printed: Any = {"color": IHA, "mfc": "white", "label": "IHA as printed in B.1: values +V, +V"}
    axis.plot(curves.x[::6], curves.printed[::6], "o", **printed)
    axis.plot(curves.x, curves.iha, color=IHA, label="IHA, P = 2: keys ±K, values ±V")
    marks = curves.x[::4]
    axis.plot(marks, marks.square().tanh() * marks, "+", color="black", label="tanh(x²)·x")
    axis.set_xlabel("x, the same number at every token")
    axis.set_ylabel("output at the last token")
    legend(axis)
    return figure


def filters(counts: Sequence[Count], epsilons: Sequence[float], errors: Sequence[float]) -> Any:
    """Draw parameters over k, and how the construction with softmax nears the linear one."""
    figure, ((left, right),) = panels(1, 2, 9.6, 3.2)
    orders = [count.k for count in counts]
    for name, counted, formula, colour in (
        ("MHA, k heads", [c.mha for c in counts], [c.mha_formula for c in counts], MHA),
        ("IHA, ⌈√k⌉ heads", [c.iha for c in counts], [c.iha_formula for c in counts], IHA),
    ):
        left.plot(orders, counted, "o", label=f"{name}, counted", color=colour, **SMALL)
        left.plot(orders, formula, label="the paper's formula", color=colour, **SMALL)
    left.set_xlabel("k, length of the filter bank")
    left.set_ylabel("parameters")
    left.set_ylim(bottom=0)
    legend(left)
    right.loglog(epsilons, errors, "o-", color=IHA, label="measured", **SMALL)
    squares = [errors[0] * (epsilon / epsilons[0]) ** 2 for epsilon in epsilons]
    right.loglog(epsilons, squares, "--", color="grey", label="∝ ε²", **SMALL)
    right.set_ylim(bottom=min(errors) / 3)
    right.set_xlabel("ε, scale of the softmax")
    right.set_ylabel("error of the filter bank, relative")
    legend(right)
    return figure


def patterns(mha: Ranks, iha: Sequence[Ranks]) -> Any:
    figure, ((axis,),) = panels(1, 1, 4.8, 3.2)
    P = [one.pseudo_heads for one in iha]
    axis.plot(P, [p**2 for p in P], color="grey", label="P²", **SMALL)
    axis.plot(P, [one.head for one in iha], "o", color=IHA, label="IHA head")
    scores = [one.head_scores for one in iha]
    axis.plot(P, scores, "x--", color=IHA, label="IHA head, scores before softmax", linewidth=1)
    axis.plot(P, [mha.head] * len(P), "s", color=MHA, label="MHA head", **SMALL)
    axis.set_xlabel("P, pseudo-heads")
    axis.set_ylabel("independent attention patterns")
    axis.set_ylim(bottom=0)
    legend(axis)
    return figure
