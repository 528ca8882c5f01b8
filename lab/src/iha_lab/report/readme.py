"""Render results/bench and results/quickstart into docs/benchmarks.md and README.md.

`python -m iha_lab.report.readme` rewrites both between their markers; with `--check` it only exits
with status 1 where one of them is out of date.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

from iha_lab.bench.cases import FLASH_MHA, MHA, MIXED, PLAIN, RECIPE, Layer
from iha_lab.bench.record import BOTH, FORWARD, STEP, Record
from iha_lab.bench.report import (
    CAPTION,
    heading,
    median,
    mib,
    of_ceilings,
    peak_ratio,
    percent,
    plain_name,
    ratio,
    reasons,
    seconds,
    title,
)
from iha_lab.data.retrieval import Accuracy

ROOT = Path(__file__).parents[4]


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def wrap(text: str) -> str:
    return textwrap.fill(text, 100)


def cpu_tables(part: Record) -> str:
    """The case `cpu`: against the recipe, alone, and `streamed` against `sdpa`."""
    layer = part["rows"][0]["layer"]
    head = (
        f"Measured on {part['date']}: {part['device']}, {part['threads']} threads, PyTorch"
        f" {part['versions']['torch']}; B = {layer['B']}, H = P = {layer['H']}, d = {layer['d']},"
        f" {layer['dtype']}, flat causality. Medians; the spread is over the rounds, in which the"
        " contestants alternate."
    )
    rows = {(row["layer"]["about"], row["layer"]["N"]): row for row in part["rows"]}
    against = [
        [
            str(N),
            str(row["layer"]["window"]),
            label,
            seconds(median(row, RECIPE, label)),
            seconds(median(row, "local", label)),
            _faster(row, label),
        ]
        for (about, N), row in rows.items()
        for label in (FORWARD, BOTH)
        if about == "window" and median(row, RECIPE, label) is not None
    ]
    alone: list[list[str]] = []
    for N in dict.fromkeys(N for about, N in rows if about == "fixed window"):
        line = [str(N)]
        for about in ("fixed window", "window"):
            row = rows[about, N]
            times = (median(row, "local", label) for label in (FORWARD, BOTH))
            line += [str(row["layer"]["window"])]
            line += ["" if time is None else f"{time / N * 1e6:.1f}" for time in times]
        alone.append(line)
    row = next(row for (about, _), row in rows.items() if about == "global")
    memory = [
        [
            f"`{name}`",
            mib(row["contestants"][name].get("peak", {}).get("bytes")),
            seconds(median(row, name, BOTH)),
        ]
        for name in ("sdpa", "streamed")
    ]
    peak, time = peak_ratio(row, "streamed", "sdpa"), ratio(row, "streamed", "sdpa", BOTH)
    memory.append(["`streamed` / `sdpa`", f"**{_two(peak)}**", _two(time)])
    given = Layer(**row["layer"])
    base = given.floor_bytes() // 4
    return f"""{wrap(head)}

**A window layer against the published recipe** (einsum, interleave, SDPA with a dense window mask
over N·P × N·P made beforehand, einsum), W = N/(2P²):

{table(["N", "W", "pass", "published recipe", "`local`", "times faster"], against)}

**`local` alone, microseconds per token**: with a fixed window on the left, with W = N/(2P²) on the
right, where a token sees twice as much each time N doubles.

{table(["N", *(["W", "forward", "forward + backward"] * 2)], alone)}

**A global layer, forward + backward, N = {given.N}**: peak memory beyond the inputs,
their gradients included. A base tensor has {mib(base)}, a pseudo
tensor {mib(base * given.P)}.

{table(["backend", "peak memory", "time"], memory)}
"""


def _faster(row: Record, label: str) -> str:
    first, second = (row["contestants"][name][label]["seconds"] for name in (RECIPE, "local"))
    each = [a / b for a, b in zip(first, second, strict=True)]
    return f"**{ratio(row, RECIPE, 'local', label):.1f}** ({min(each):.1f} to {max(each):.1f})"


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def gpu_tables(record: Record) -> str:
    """What `iha bench` measured on a GPU: `fused`, the best other backend, plain attention."""
    parts: list[str] = []
    for name, part in record["cases"].items():
        columns = ["layer", "pass", "`fused`", "fastest other", "times faster"]
        columns += ["time / plain", "peak / plain", "of the FLOP/s ceiling"]
        rows = [line for row in part["rows"] if "layer" in row for line in _gpu_lines(part, row)]
        if any("model" in row for row in part["rows"]):
            columns = ["model", "plain, a step", "IHA, a step", "time / plain"]
            rows = [
                [
                    title(row),
                    *(seconds(median(row, who, STEP)) or _why(row, who) for who in (PLAIN, MIXED)),
                    _two(ratio(row, MIXED, PLAIN, STEP)),
                ]
                for row in part["rows"]
            ]
        quick = " Tiny sizes (`--quick`)." if part["quick"] else ""
        parts += [f"**Case `{name}`**: {heading(part)}.{quick}", table(columns, rows)]
    return "\n\n".join((*parts, CAPTION)) + "\n"


def _gpu_lines(part: Record, row: Record) -> list[list[str]]:
    lines: list[list[str]] = []
    for label in (FORWARD, BOTH):
        if label == BOTH and Layer(**row["layer"]).decodes:
            continue
        others = {
            name: time
            for name in row["contestants"]
            if name not in (MHA, FLASH_MHA, "fused")
            and (time := median(row, name, label)) is not None
        }
        best = min(others, key=lambda name: others[name], default=None)
        faster = None if best is None else ratio(row, best, "fused", label)
        plain = plain_name(row, label)
        parts = of_ceilings(part, row, "fused") if label == FORWARD else None
        lines.append(
            [
                title(row),
                label,
                seconds(median(row, "fused", label)) or _why(row, "fused"),
                "" if best is None else f"{best}, {seconds(others[best])}",
                _two(faster),
                _two(ratio(row, "fused", plain, label)),
                _two(peak_ratio(row, "fused", plain)),
                "" if parts is None else percent(parts[0]),
            ]
        )
    return lines


def _why(row: Record, name: str) -> str:
    found = row["contestants"].get(name)
    return "absent" if found is None else next(iter(reasons({"contestants": {name: found}})), "—")


NOT_MEASURED = """**The fused kernels**: not measured on a GPU. Where there is one, `make bench`
measures every backend on it and writes its table here.
"""


def quickstart_table(result: Record) -> str:
    """What `iha quickstart` measured, from its result.json."""
    rows = []
    for name, accuracy in result["accuracies"].items():
        found = Accuracy(**accuracy)
        pace = result["seconds_per_step"].get(name)
        rows.append(
            [
                name,
                f"{found.correct} of {found.total}",
                str(found),
                "" if pace is None else f"{pace:.1f} s",
            ]
        )
    columns = ["model", "right answers", "with 95 % interval (Wilson)", "time a step"]
    head = (
        f"**`iha quickstart`** with {result['model']}, P = {result['pseudo_heads']}, on"
        f" {result['date']} ({result['versions'].rstrip('.')}). After upcycling the largest logit"
        f" difference is {result['logit_difference']:.1e}, on logits of size"
        f" {result['logit_size']:.0f}. Then multi-key retrieval. {result['task']}"
        f" {result['recipe']}"
    )
    return "\n\n".join((wrap(head), table(columns, rows), wrap(result["verdict"]))) + "\n"


def measured(results: Path = ROOT / "results") -> str:
    """The three figures of README: exactness, speed against the recipe, memory."""
    quickstart = _read(results / "quickstart" / "quickstart.json")
    cpu = _read(results / "bench" / "bench-cpu.json")["cases"]["cpu"]
    window = max(
        (row for row in cpu["rows"] if row["layer"]["about"] == "window"),
        key=lambda row: row["layer"]["N"] if median(row, RECIPE, BOTH) is not None else 0,
    )
    world = next(row for row in cpu["rows"] if row["layer"]["about"] == "global")
    faster = ratio(window, RECIPE, "local", BOTH)
    memory = peak_ratio(world, "streamed", "sdpa")
    N, P = window["layer"]["N"], window["layer"]["P"]
    lines = [
        f"Exact: SmolLM2-135M upcycled at P = {quickstart['pseudo_heads']} moves its logits by at"
        f" most {quickstart['logit_difference']:.1e}, on logits of size"
        f" {quickstart['logit_size']:.0f}.",
        f"Fast: a window layer (N = {N}, P = {P}) trains {faster:.0f} times faster than the"
        " published recipe with its dense mask.",
        f"Small: `streamed` needs {memory:.2f} of the memory that `sdpa` needs for a global layer.",
    ]
    note = f"On {cpu['device']}, {cpu['threads']} threads, by `make quickstart` and `make bench`."
    bullets = (
        textwrap.fill(line, 100, initial_indent="- ", subsequent_indent="  ") for line in lines
    )
    return "\n".join((*bullets, "", wrap(note)))


def tables(results: Path = ROOT / "results") -> str:
    """Everything that was measured, for docs/benchmarks.md."""
    on_cpu = results / "bench" / "bench-cpu.json"
    gpus = [file for file in sorted(results.glob("bench/bench-*.json")) if file != on_cpu]
    parts = [
        cpu_tables(_read(on_cpu)["cases"]["cpu"]),
        *([gpu_tables(_read(file)) for file in gpus] or [NOT_MEASURED]),
        quickstart_table(_read(results / "quickstart" / "quickstart.json")),
    ]
    return "\n\n".join(parts).rstrip()


PAGES = {"README.md": ("measured", measured), "docs/benchmarks.md": ("results", tables)}


def rendered(name: str, results: Path = ROOT / "results") -> str:
    """The page called `name`, with what the result files say now between its markers."""
    marker, write = PAGES[name]
    begin, end = (f"<!-- {marker}:{edge} -->" for edge in ("begin", "end"))
    before, rest = (ROOT / name).read_text().split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{write(results)}\n\n{end}{after}"


def _read(file: Path) -> Record:
    return json.loads(file.read_text())


def main() -> None:
    for name in PAGES:
        now = rendered(name)
        if now == (ROOT / name).read_text():
            continue
        if sys.argv[1:] == ["--check"]:
            sys.exit(f"{name} is out of date; run python -m iha_lab.report.readme.")
        (ROOT / name).write_text(now)


if __name__ == "__main__":
    main()
