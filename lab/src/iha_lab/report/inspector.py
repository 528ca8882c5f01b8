"""The page on which one looks into a model: a file of its own that needs no network.

Maps are one byte a weight, the square root of it in `levels` steps, and weights below `floor` are
left out; gzip and base64 make them text. Both are as fine as the page's size allows, and the page
says how fine. The browser unpacks a layer when it is looked at; plotly.js draws.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go  # pyright: ignore[reportMissingTypeStubs]
from plotly.colors import get_colorscale  # pyright: ignore[reportMissingTypeStubs]
from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from iha import AttentionPattern, HeadMixing
from iha_lab.inspection import LayerReport
from iha_lab.report import pages
from iha_lab.report.tables import Table

MOST_BYTES = 9_800_000
# (levels, floor), from fine to coarse.
SCALES = ((255, 0.0), (127, 0.001), (63, 0.002), (63, 0.005), (31, 0.01), (31, 0.02), (15, 0.04))
PAIRS = 24_000_000  # weights of single pairs that are kept before they are packed
COLOURS = {  # from none to all of the weight, and from negative over nothing to positive
    "light": [get_colorscale("Purples"), [[0, "#0072b2"], [0.5, "#ffffff"], [1, "#d55e00"]]],
    "dark": [get_colorscale("Inferno"), [[0, "#56b4e9"], [0.5, "#14161a"], [1, "#e69f00"]]],
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """What the page shows of one: where its heads look, with IHA and beside it, and the mixing."""

    name: str
    pattern: AttentionPattern
    beside: AttentionPattern
    mixing: HeadMixing | None
    moved: list[float]  # of each head, from its start: pairs are kept of those that moved furthest


@dataclasses.dataclass
class _Packed:
    """The maps of a layer behind each other, and where each begins."""

    roots: list[np.ndarray[Any, Any]]
    mixing: list[np.ndarray[Any, Any]]
    about: dict[str, Any]

    def text(self, levels: int, floor: float) -> str:
        maps = [
            np.where(r < floor**0.5, 0, np.rint(r * levels)).astype(np.uint8) for r in self.roots
        ]
        parts = [*(m.tobytes() for m in maps), *(m.tobytes() for m in self.mixing)]
        return base64.b64encode(gzip.compress(b"".join(parts), 6, mtime=0)).decode()


def write(
    file: Path,
    *,
    model: str,
    beside: str,
    tokens: Sequence[str],
    layers: Sequence[Layer],
    table: Table,
    tell: Callable[[int, str], None] = lambda done, note: None,
) -> tuple[int, float]:
    """Write the page; return (levels, floor) of its weights.

    `beside` says what stands at the right of the model's own maps. Raises ValueError where even the
    coarsest page would be larger than MOST_BYTES.
    """
    kept = _kept(layers, len(tokens))
    packed: list[_Packed] = []
    for i, layer in enumerate(layers):
        packed.append(_pack(layer, kept[i]))
        tell(i + 1, layer.name)
    library = base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
    room = MOST_BYTES - len(library)
    for levels, floor in SCALES:
        texts: list[str] = []
        for one in packed:
            texts.append(one.text(levels, floor))
            if sum(map(len, texts)) > room:
                break
        else:
            break
    else:
        raise ValueError(
            f"prompt has {len(tokens)} tokens, and {len(layers)} layers of that length do not fit"
            f" into a page of {MOST_BYTES // 10**6} MB; choose fewer layers, or a shorter prompt."
        )
    about = {
        "tokens": list(tokens),
        "names": [model, beside],
        "levels": levels,
        "start": _moved_furthest(layers),
        "layers": [one.about for one in packed],
        "colours": COLOURS,
        "figures": {"heat": _heat(), "mixing": _mixing()},
    }
    pages.write(
        file,
        "report/inspector.html.jinja",
        model=model,
        beside=beside,
        # "<" would end the script element that holds it.
        about=json.dumps(about, ensure_ascii=False).replace("<", "\\u003c"),
        library=library,
        layers=texts,
        numbers=table,
        levels=levels,
        floor=floor,
    )
    return levels, floor


def _moved_furthest(layers: Sequence[Layer]) -> list[int]:
    """The layer and its head with which the page begins."""
    moved = [(x, -i, -h) for i, layer in enumerate(layers) for h, x in enumerate(layer.moved)]
    _, i, h = max(moved, default=(0.0, 0, 0))
    return [-i, -h]


def _kept(layers: Sequence[Layer], tokens: int) -> list[list[int]]:
    """The heads of each layer whose pairs are kept: those that moved furthest, while room is."""
    kept: list[list[int]] = [[] for _ in layers]
    room = PAIRS
    moved = [(-x, i, h) for i, layer in enumerate(layers) for h, x in enumerate(layer.moved)]
    for _, i, h in sorted(moved):
        mixing = layers[i].mixing
        assert mixing is not None
        room -= mixing.pseudo_queries * mixing.pseudo_heads * tokens**2
        if room < 0:
            break
        kept[i].append(h)
    return [sorted(heads) for heads in kept]


def _pack(layer: Layer, kept: list[int]) -> _Packed:
    roots = [_root(pattern.tokens[0]) for pattern in (layer.pattern, layer.beside)]
    for h in kept:
        pairs = dataclasses.replace(layer.pattern, heads=[h]).pairs
        roots.append(_root(pairs[0, 0].permute(1, 3, 0, 2)))
    about: dict[str, Any] = {
        "name": layer.name,
        "heads": len(layer.pattern.heads),
        "kept": kept,
        "queries": [0],
        "keys": 1,
    }
    mixing: list[np.ndarray[Any, Any]] = []
    if layer.mixing is not None:
        P, Pq = layer.mixing.pseudo_heads, layer.mixing.pseudo_queries
        about |= {"queries": list(range(P - Pq, P)), "keys": P}
        tensors = (layer.mixing.alpha_q, layer.mixing.alpha_k, layer.mixing.alpha_v)
        for tensor in (*tensors, layer.mixing.collapse):
            values = tensor.detach().float().cpu()
            # [p, listens, is heard]: column h of α is what pseudo-head h hears, row h' of R too.
            values = values[None] if values.ndim == 2 else values
            listens_first = tensor is layer.mixing.collapse
            rule = (2, 0, 1) if listens_first else (2, 1, 0)
            mixing.append(np.ascontiguousarray(values.permute(*rule).numpy().round(3)))
        about["mixing"] = [list(m.shape) for m in mixing]
    return _Packed(roots, mixing, about)


def _root(weights: Tensor) -> np.ndarray[Any, Any]:
    """√w as float16: 0 and 1 exactly, and finer between than any scale here."""
    return weights.float().clamp(0, 1).sqrt().cpu().numpy().astype(np.float16)


def _heat() -> dict[str, Any]:
    """A heat map without its weights; the colour is their square root."""
    ticks = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
    trace = go.Heatmap(
        zmin=0,
        zmax=1,
        hovertemplate="%{y}<br>reads %{x}<br>weight %{customdata:.3f}<extra></extra>",
        colorbar={
            "tickvals": [t**0.5 for t in ticks],
            "ticktext": [f"{t:g}" for t in ticks],
            "thickness": 12,
            "title": {"text": "weight"},
        },
    )
    axes = {"showgrid": False, "zeroline": False, "automargin": True, "type": "category"}
    layout = go.Layout(
        xaxis={**axes, "title": {"text": "token that is read"}, "tickangle": -90},
        yaxis={**axes, "title": {"text": "token that reads"}, "autorange": "reversed"},
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        template=None,
    )
    return _without_data(go.Figure(trace, layout))


def _mixing() -> dict[str, Any]:
    trace = go.Heatmap(
        xgap=1,
        ygap=1,
        hovertemplate="head %{y} hears head %{x}: %{z:.3f}<extra></extra>",
        colorbar={"thickness": 8},
    )
    axes = {"showgrid": False, "zeroline": False, "dtick": 1, "automargin": True}
    layout = go.Layout(
        xaxis={**axes, "title": {"text": "is heard"}},
        yaxis={**axes, "title": {"text": "listens"}, "autorange": "reversed"},
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        height=260,
        template=None,
    )
    return _without_data(go.Figure(trace, layout))


def _without_data(figure: go.Figure) -> dict[str, Any]:
    found = json.loads(str(figure.to_json()))
    return {"trace": found["data"][0], "layout": found["layout"]}


def numbers(reports: Sequence[LayerReport], heads: bool) -> Table:
    """A row for each layer, or for each head."""
    first = reports[0]
    rows: list[list[str]] = []
    for report in reports:
        edges = ", ".join(
            f"{kind} {i}←{j} {weight:.2f}" for kind, i, j, weight in report.talk.strongest(2)
        )
        for h in range(len(report.ranks)) if heads else (None,):
            ranks = report.ranks if h is None else [report.ranks[h]]
            distances = report.distances.mean(0) if h is None else report.distances[h]
            low, high = f"{min(ranks):.1f}", f"{max(ranks):.1f}"
            rows.append(
                [
                    report.name if h is None else f"{report.name} head {h}",
                    low if low == high else f"{low} to {high}",
                    *(f"{distance:.3f}" for distance in distances.tolist()),
                    edges if h in (None, 0) else "",
                    _listed(report.unread, h),
                    _listed(report.ignored, h) if h is None else "",
                ]
            )
    most = first.pseudo_queries * first.pseudo_heads
    return Table(
        [
            "layer",
            f"patterns (of {most})",
            *("α^Q", "α^K", "α^V", "R"),
            "strongest between heads",
            "unread queries",
            "ignored keys",
        ],
        rows,
        note=(
            "patterns: the effective rank of a head's maps on the prompt, lowest to highest."
            " α^Q to R: distance from an exact start; 1 is as far as the head itself is large."
            " a←b: which share of what a hears is b. unread queries: pseudo-queries (h, p) that R"
            " leaves out; ignored keys: pseudo-keys (g, q) that hardly any query reads."
        ),
    )


def _listed(pairs: Sequence[tuple[int, int]], head: int | None) -> str:
    chosen = [f"({a}, {b})" for a, b in pairs if head in (None, a)]
    return ", ".join(chosen[:3]) + (f" and {len(chosen) - 3} more" if len(chosen) > 3 else "")


def names(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """How each token reads, its white space made visible."""
    shown = [tokenizer.decode([int(i)]) for i in ids]
    return [s.strip(" ").replace("\n", "⏎").replace("\t", "⇥") or "␣" for s in shown]
