"""The pictures of the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from iha.modules import HeadMixing

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}


def _plots() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(STYLE)
    return pyplot


def data_uri(figure: Any) -> str:
    """A picture that an HTML page holds in itself."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    _plots().close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def loss_curves(losses: Mapping[str, Sequence[float]]) -> Any:
    figure, axis = _plots().subplots(figsize=(6, 3))
    for name, curve in losses.items():
        axis.plot(range(1, len(curve) + 1), curve, label=name, linewidth=1.5)
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("loss on the answers (nats a token)")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    return figure


def bars(heights: Mapping[str, tuple[float, float]], measure: str) -> Any:
    """A bar for each name, with half the width of its interval as the error (NaN: none)."""
    figure, axis = _plots().subplots(figsize=(6, 0.45 * len(heights) + 0.9))
    names = list(heights)
    means = [mean for mean, _ in heights.values()]
    halves = [0.0 if half != half else half for _, half in heights.values()]
    colors = ["#c2571a" if name.startswith("iha") else "#8aa0bd" for name in names]
    axis.barh(names, means, xerr=halves, color=colors, error_kw={"elinewidth": 1, "capsize": 3})
    axis.invert_yaxis()
    axis.set_xlabel(measure)
    # Differences are what is looked at: the axis may start above zero, and says where.
    low = min(mean - half for mean, half in zip(means, halves, strict=True))
    high = max(mean + half for mean, half in zip(means, halves, strict=True))
    margin = 0.15 * (high - low) or 0.05 * abs(high) or 1.0
    axis.set_xlim(low - margin, high + margin)
    return figure


def mean_curves(curves: Mapping[str, Sequence[tuple[float, float, float]]], x: str, y: str) -> Any:
    """A line of means for each name, in a band of (x, mean, half width) intervals."""
    figure, axis = _plots().subplots(figsize=(6, 3.2))
    for name, points in curves.items():
        xs, means, halves = (list(values) for values in zip(*points, strict=True))
        width = 2.2 if name.startswith("iha") else 1.2
        (line,) = axis.plot(xs, means, label=name, linewidth=width, marker="." * (len(xs) < 30))
        low = [mean - half for mean, half in zip(means, halves, strict=True)]
        high = [mean + half for mean, half in zip(means, halves, strict=True)]
        axis.fill_between(xs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.legend(frameon=False, fontsize=8)
    return figure


def mixing_maps(mixing: HeadMixing) -> Any:
    """A row for each mixing tensor, a column for each pseudo-head; one colour scale a row."""
    tensors = {
        "α^Q[m, h, p]": mixing.alpha_q,
        "α^K[m, g, q]": mixing.alpha_k,
        "α^V[m, g, q]": mixing.alpha_v,
        "R[h', h, p]": mixing.collapse if mixing.collapse.ndim == 3 else mixing.collapse[None],
    }
    P = mixing.pseudo_heads
    figure, axes = _plots().subplots(4, P, figsize=(1.9 * P + 1, 7.6), squeeze=False)
    for p, axis in enumerate(axes[0]):
        axis.set_title(f"pseudo-head {p}")
    for row, (name, tensor) in zip(axes, tensors.items(), strict=True):
        values = tensor.detach().float().cpu().numpy()
        limit = float(abs(values).max())
        image = None
        for p, axis in enumerate(row):
            image = axis.imshow(values[:, :, p], cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name)
        figure.colorbar(image, ax=row, fraction=0.02)
    return figure


def pattern_maps(patterns: Float[Tensor, "P P N S"]) -> Any:
    """P rows of pseudo-queries, P columns of pseudo-keys; darker is more weight (square root)."""
    P = patterns.shape[0]
    weights = patterns.sqrt().cpu().numpy()
    figure, axes = _plots().subplots(P, P, figsize=(1.9 * P, 1.9 * P), squeeze=False)
    for p, row in enumerate(axes):
        for q, axis in enumerate(row):
            axis.imshow(weights[p, q], cmap="magma_r", vmin=0, vmax=float(weights.max()))
            axis.set_xticks([])
            axis.set_yticks([])
            if p == 0:
                axis.set_title(f"key {q}")
            if q == 0:
                axis.set_ylabel(f"query {p}")
    return figure
