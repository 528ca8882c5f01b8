"""What `iha bench` measured, as tables and a figure. Every ratio is of medians of one race."""

from __future__ import annotations

from typing import Any

from iha_lab.bench.cases import FLASH_MHA, MHA, PLAIN, RECIPE, Layer, Model
from iha_lab.bench.measure import BOTH, FORWARD, STEP, Record
from iha_lab.report import figures
from iha_lab.report.tables import Table

CAPTION = (
    "Ratios are of medians of one run. Predicted is the ratio of counted FLOPs."
    " Of FLOPs: the definition's own (iha.attention_flops), as a"
    " part of what a large matrix product reaches. Of bytes: the base tensors once through memory"
    " (the floor: query, key, value in, the output out), as a part of what a large copy reaches."
    " Peak memory is beyond the inputs, gradients included."
)


def median(row: Record, name: str, label: str) -> float | None:
    """Return the median in seconds; None where it was not timed."""
    return row["implementations"].get(name, {}).get(label, {}).get("median")


def plain_name(row: Record, label: str) -> str:
    """Name the faster plain attention."""
    timed = [(median(row, name, label), name) for name in (MHA, FLASH_MHA, PLAIN)]
    return min(((m, name) for m, name in timed if m is not None), default=(0.0, MHA))[1]


def ratio(row: Record, first: str, second: str, label: str) -> float | None:
    """Divide the median of `first` by that of `second`; None where one was not timed."""
    above, below = median(row, first, label), median(row, second, label)
    return None if above is None or below is None else above / below


def peak(row: Record, name: str) -> int | None:
    """Return bytes of peak memory; None where it was not measured."""
    return row["implementations"].get(name, {}).get("peak", {}).get("bytes")


def peak_ratio(row: Record, first: str, second: str) -> float | None:
    above, below = peak(row, first), peak(row, second)
    return above / below if above and below else None


def of_ceilings(part: Record, row: Record, name: str) -> tuple[float, float] | None:
    """Return achieved forward FLOP/s and bytes/s as parts of the machine's own.

    None for plain attention, which is another function, and where nothing was timed.
    """
    time = median(row, name, FORWARD)
    if time is None or name in (MHA, FLASH_MHA):
        return None
    flops = row["flops"] / time / part["flops_per_second"][row["layer"]["dtype"]]
    return flops, row["floor_bytes"] / time / part["bytes_per_second"]


def title(row: Record) -> str:
    if "model" in row:
        return Model(**row["model"]).title()
    layer = Layer(**row["layer"])
    cache = f", cache {mib(row['cache_bytes'])} as plain attention's" if layer.decodes else ""
    return layer.title() + cache


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f} MiB"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def heading(part: Record) -> str:
    ceilings = ", ".join(
        f"{flops / 1e9:.0f} GFLOP/s ({dtype})" for dtype, flops in part["flops_per_second"].items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    return (
        f"{part['device']}, {part['date']}, {versions}; ceilings"
        f" {part['bytes_per_second'] / 1e9:.0f} GB/s, {ceilings}"
    )


def tables(part: Record) -> list[Table]:
    """Make a table for each row of a case, with the reasons of those without numbers below it."""
    found: list[Table] = []
    for row in part["rows"]:
        columns, cells = _model_cells(row) if "model" in row else _layer_cells(part, row)
        note = "\n".join(reasons(row))
        told = title(row)
        if "layer" in row:
            told += f"; predicted {Layer(**row['layer']).predicted():.2f} times plain attention"
        found.append(Table(["", *columns], cells, told, note).dense())
    return found


def _layer_cells(part: Record, row: Record) -> tuple[list[str], list[list[str]]]:
    labels = [FORWARD] if Layer(**row["layer"]).decodes else [FORWARD, BOTH]
    columns = [c for label in labels for c in (label, "over plain", "recipe over it")]
    columns += ["peak memory", "over plain", "of FLOP/s", "of bytes/s"]
    lines: list[list[str]] = []
    for name in row["implementations"]:
        cells = [name]
        for label in labels:
            plain = plain_name(row, label)
            cells.append(seconds(median(row, name, label)) or "—")
            cells += [times(ratio(row, name, plain, label)), times(ratio(row, RECIPE, name, label))]
        parts = of_ceilings(part, row, name)
        cells += [mib(peak(row, name)), times(peak_ratio(row, name, MHA))]
        cells += ["", ""] if parts is None else [f"{value:.1%}" for value in parts]
        lines.append(cells)
    return columns, lines


def _model_cells(row: Record) -> tuple[list[str], list[list[str]]]:
    lines: list[list[str]] = []
    for name, found in row["implementations"].items():
        pace = found.get("tokens_per_second")
        lines.append(
            [
                name,
                seconds(median(row, name, STEP)) or "—",
                times(ratio(row, name, PLAIN, STEP)),
                "" if pace is None else f"{pace:.0f}",
                mib(peak(row, name)),
            ]
        )
    return [STEP, "over plain", "tokens/s", "peak memory"], lines


def reasons(row: Record) -> list[str]:
    """Say why implementations have no number, in a sentence each."""
    found: dict[str, None] = {}
    for name, told in row["implementations"].items():
        for part in (told, *(told.get(label, {}) for label in (FORWARD, BOTH, STEP, "peak"))):
            if "why_not" in part:
                found[f"{name}: {part['why_not']}"] = None
    return list(found)


def figure(record: Record) -> Any:
    """Draw the median of each implementation's longest pass, as bars from zero.

    A panel for each row in which several were timed; there is nothing to compare in the others.
    """
    panels: list[tuple[str, dict[str, float]]] = []
    for case, part in record["cases"].items():
        for row in part["rows"]:
            label = STEP if "model" in row else FORWARD if Layer(**row["layer"]).decodes else BOTH
            found = {name: median(row, name, label) for name in row["implementations"]}
            timed = {name: time for name, time in found.items() if time is not None}
            if len(timed) > 1:
                panels.append((f"{case}: {title(row)}, {label}", timed))
    heights = [0.5 + 0.25 * len(timed) for _, timed in panels] or [1.0]
    drawn, axes = figures.panels(len(heights), 1, 8, sum(heights), height_ratios=heights)
    for (text, timed), axis in zip(panels, axes[:, 0], strict=False):
        colours = [figures.COLOURS["plain" if n.startswith("plain") else "iha"] for n in timed]
        bars = axis.barh(list(timed), list(timed.values()), color=colours)
        axis.bar_label(bars, [seconds(time) for time in timed.values()], padding=3, fontsize=8)
        axis.set_ylim(len(timed) - 0.4, -0.6)
        axis.set_xlim(right=1.12 * max(timed.values()))
        axis.set_xticks([])
        axis.set_title(text, fontsize=9, loc="left")
    return drawn
