"""The figures of a file as tables and a picture. Every ratio is of medians of one race."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from iha_lab.bench.cases import FLASH_MHA, MHA, PLAIN, RECIPE, Layer, Model
from iha_lab.bench.record import BOTH, FORWARD, STEP, Record
from iha_lab.report import figures

CAPTION = (
    "Ratios are of medians of one run. Of FLOPs: the definition's own (iha.attention_flops), as a"
    " part of what a large matrix product reaches. Of bytes: the base tensors once through memory"
    " (the floor: query, key, value in, the output out), as a part of what a large copy reaches."
    " Peak memory is beyond the inputs, gradients included."
)


def median(row: Record, name: str, label: str) -> float | None:
    """Seconds; None where it was not timed."""
    return row["contestants"].get(name, {}).get(label, {}).get("median")


def plain_name(row: Record, label: str) -> str:
    """The faster plain attention."""
    timed = [(median(row, name, label), name) for name in (MHA, FLASH_MHA, PLAIN)]
    return min(((m, name) for m, name in timed if m is not None), default=(0.0, MHA))[1]


def ratio(row: Record, first: str, second: str, label: str) -> float | None:
    """Median of `first` over that of `second`; None where one was not timed."""
    above, below = median(row, first, label), median(row, second, label)
    return None if above is None or below is None else above / below


def peak_ratio(row: Record, first: str, second: str) -> float | None:
    above, below = (
        row["contestants"].get(name, {}).get("peak", {}).get("bytes") for name in (first, second)
    )
    return above / below if above and below else None


def of_ceilings(part: Record, row: Record, name: str) -> tuple[float, float] | None:
    """Achieved forward FLOP/s and bytes/s as parts of the machine's own.

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


def why_not(contestant: Record, label: str) -> str | None:
    return contestant.get("why_not") or contestant.get(label, {}).get("why_not")


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


def percent(value: float) -> str:
    return f"{value:.1%}"


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
    """One for each row of a case."""
    return [
        _model_table(row) if "model" in row else _layer_table(part, row) for row in part["rows"]
    ]


def _layer_table(part: Record, row: Record) -> Table:
    table = Table(title=title(row), title_justify="left")
    labels = [FORWARD] if Layer(**row["layer"]).decodes else [FORWARD, BOTH]
    table.add_column("")
    for label in labels:
        for column in (label, "over plain", "recipe over it"):
            table.add_column(column, justify="right")
    for column in ("peak", "over plain", "of FLOPs", "of bytes"):
        table.add_column(column, justify="right")
    for name, found in row["contestants"].items():
        cells = [name]
        for label in labels:
            plain = plain_name(row, label)
            cells.append(seconds(median(row, name, label)) or "—")
            cells += [times(ratio(row, name, plain, label)), times(ratio(row, RECIPE, name, label))]
        parts = of_ceilings(part, row, name)
        cells += [mib(found.get("peak", {}).get("bytes")), times(peak_ratio(row, name, MHA))]
        cells += ["", ""] if parts is None else [percent(value) for value in parts]
        table.add_row(*cells)
    return table


def _model_table(row: Record) -> Table:
    table = Table("", title=title(row), title_justify="left")
    for column in (STEP, "over plain", "tokens/s", "peak"):
        table.add_column(column, justify="right")
    for name, found in row["contestants"].items():
        pace = found.get("tokens_per_second")
        table.add_row(
            name,
            seconds(median(row, name, STEP)) or "—",
            times(ratio(row, name, PLAIN, STEP)),
            "" if pace is None else f"{pace:.0f}",
            mib(found.get("peak", {}).get("bytes")),
        )
    return table


def reasons(row: Record) -> list[str]:
    """Why a contestant has no figure, a sentence each."""
    found: list[str] = []
    for name, contestant in row["contestants"].items():
        for label in (FORWARD, BOTH, STEP, "peak"):
            why = why_not(contestant, label)
            if why and (line := f"{name}: {why}") not in found:
                found.append(line)
    return found


def picture(record: Record, file: Path) -> None:
    """Bars: the median of each contestant's longest pass, a panel for each row; PNG."""
    rows = [(name, row) for name, part in record["cases"].items() for row in part["rows"]]
    heights = [1 + 0.3 * len(row["contestants"]) for _, row in rows]
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(8, sum(heights)), layout="tight")
        axes: Any = figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights)
    for (case, row), axis in zip(rows, axes[:, 0], strict=True):
        label = STEP if "model" in row else FORWARD if Layer(**row["layer"]).decodes else BOTH
        timed = {n: m for n in row["contestants"] if (m := median(row, n, label)) is not None}
        bars = axis.barh(list(timed), [time * 1e3 for time in timed.values()], color="#4878a8")
        axis.bar_label(bars, [seconds(time) for time in timed.values()], padding=3)
        axis.invert_yaxis()
        axis.set_xticks([])
        axis.set_title(f"{case}: {title(row)}, {label}", fontsize=9, loc="left")
    figure.savefig(file, dpi=110)
