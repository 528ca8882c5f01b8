"""Figures: one style, and one look for one attention wherever it is drawn."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from iha_lab.stats import Mean

STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
DPI = 130
# Beginnings of labels, and their colours: Okabe and Ito's, which colour-blind readers tell apart.
COLOURS = {
    "iha": "#d55e00",
    "mha": "#0072b2",
    "plain": "#0072b2",
    "talking-heads": "#009e73",
    "differential": "#cc79a7",
    "knocking-heads": "#e69f00",
    "local-global": "#56b4e9",
    "2-simplicial": "#6b7280",
}
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX*"
FEW = 8  # points of a curve


def looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Choose a colour by the kind of attention, dashes by its variant, a marker for each label.

    A label of no known kind takes a colour that no other label on the figure has.
    """
    kinds = [next((k for k in COLOURS if label.lower().startswith(k)), label) for label in labels]
    free = iter([c for c in dict.fromkeys(COLOURS.values()) if c not in map(COLOURS.get, kinds)])
    unknown = {kind: next(free, "black") for kind in dict.fromkeys(kinds) if kind not in COLOURS}
    return {
        label: {
            "color": (COLOURS | unknown)[kind],
            "linestyle": DASHES[kinds[:i].count(kind) % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        for i, (label, kind) in enumerate(zip(labels, kinds, strict=True))
    }


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """Make a figure and its rows of axes, in the one style; sizes are in inches.

    It is made without pyplot: there is no list of open figures, and no display is asked for.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI, bbox_inches="tight")


def data_uri(figure: Any) -> str:
    """Encode a figure for an HTML page that holds it in itself."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def intervals(measured: Mapping[str, tuple[Mean, Sequence[float]]], measure: str) -> Any:
    """Draw every seed as a ring, the mean as a point, its interval as a line; a row per label.

    Points, unlike bars, do not say that the axis starts at zero.
    """
    figure, ((axis,),) = panels(1, 1, 6, 0.4 * len(measured) + 0.8)
    for (label, (mean, seeds)), look in zip(
        measured.items(), looks(list(measured)).values(), strict=True
    ):
        colour = look["color"]
        axis.plot(seeds, [label] * len(seeds), "o", mfc="none", mec=colour, ms=4, alpha=0.6)
        error = mean.half if mean.half > 0 else None
        axis.errorbar(mean.mean, label, xerr=error, fmt=look["marker"], color=colour, capsize=3)
    axis.set_ylim(len(measured) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel(measure)
    return figure


def curves(points: Mapping[str, Sequence[tuple[float, Mean]]], x: str, y: str) -> Any:
    """Draw a line of means for each label, with intervals: bars at few points, a band at many.

    Later lines are thinner, with smaller markers at other points, and bars stand side by side:
    equal curves all stay visible.
    """
    figure, ((axis,),) = panels(1, 1, 6, 3.2)
    few = max(map(len, points.values())) <= FEW
    ends = [x for curve in points.values() for x, _ in curve]
    apart = 0.01 * (max(ends) - min(ends)) if few else 0.0
    for i, (label, look) in enumerate(looks(list(points)).items()):
        curve = points[label]
        xs, means = [x + i * apart for x, _ in curve], [mean.mean for _, mean in curve]
        low, high = [m.mean - m.half for _, m in curve], [m.mean + m.half for _, m in curve]
        every = max(1, len(curve) // FEW)
        style = look | {"linewidth": 3 / (1 + 0.6 * i), "markersize": max(4.0, 8 - 1.5 * i)}
        axis.plot(xs, means, label=label, markevery=(i * every // len(points), every), **style)
        if few:
            axis.vlines(xs, low, high, color=look["color"], linewidth=1)
        else:
            axis.fill_between(xs, low, high, color=look["color"], alpha=0.12, linewidth=0)
    if few:
        axis.set_xticks(sorted(set(ends)))
    if "accuracy" in y:
        axis.set_ylim(top=min(axis.get_ylim()[1], 1.03))
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    legend(axis)
    return figure


def legend(axis: Any) -> None:
    axis.legend(frameon=False, fontsize=8)


def mixing_maps(mixing: Any) -> Any:
    """Draw a row for each mixing tensor, a column for each pseudo-head, one colour scale per row.

    `mixing` has `alpha_q`, `alpha_k`, `alpha_v`, `collapse` and `pseudo_heads`, as
    `iha.HeadMixing`.
    """
    tensors = {
        "α^Q[m, h, p]": mixing.alpha_q,
        "α^K[m, g, q]": mixing.alpha_k,
        "α^V[m, g, q]": mixing.alpha_v,
        "R[h', h, p]": mixing.collapse if mixing.collapse.ndim == 3 else mixing.collapse[None],
    }
    P = mixing.pseudo_heads
    figure, axes = panels(4, P, 1.7 * P + 1, 7.2)
    for p, axis in enumerate(axes[0]):
        axis.set_title(f"pseudo-head {p}")
    for row, (name, tensor) in zip(axes, tensors.items(), strict=True):
        values = tensor.detach().float().cpu().numpy()
        limit = float(abs(values).max())
        image = None
        for p, axis in enumerate(row):
            image = _map(axis, values[:, :, p], cmap="RdBu_r", vmin=-limit, vmax=limit)
        row[0].set_ylabel(name)
        figure.colorbar(image, ax=list(row), fraction=0.02)
    return figure


def pattern_maps(patterns: Float[Tensor, "P P N S"]) -> Any:
    """Draw P rows of pseudo-queries, P columns of pseudo-keys; darker is more weight (its root)."""
    P = patterns.shape[0]
    weights = patterns.sqrt().cpu().numpy()
    figure, axes = panels(P, P, 1.9 * P, 1.9 * P)
    for p, row in enumerate(axes):
        for q, axis in enumerate(row):
            _map(axis, weights[p, q], cmap="magma_r", vmin=0, vmax=float(weights.max()))
            if p == 0:
                axis.set_title(f"pseudo-key {q}")
            if q == 0:
                axis.set_ylabel(f"pseudo-query {p}")
    return figure


def _map(axis: Any, values: Any, **options: Any) -> Any:
    axis.set_xticks([])
    axis.set_yticks([])
    return axis.imshow(values, aspect="auto", **options)
