"""Render results/bench and results/quickstart into README.md and pages of docs.

`python -m iha_lab.report.readme` rewrites them between their markers; with `--check` it only exits
with status 1 where one of them is out of date.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import iha
from iha_lab.bench.cases import RECIPE, Layer
from iha_lab.bench.measure import BOTH, FORWARD, Record
from iha_lab.bench.traffic import moved
from iha_lab.report import bench_tables, scale_out_tables, serving_tables
from iha_lab.report.bench_tables import median, mib, peak, peak_ratio, ratio, seconds, times
from iha_lab.report.tables import ROOT, Table, generated
from iha_lab.stats import Accuracy


def wrap(text: str) -> str:
    return textwrap.fill(text, 100)


def cpu_tables(part: Record) -> str:
    """Show the case `cpu`: against the recipe, alone, and `streamed` against `sdpa`."""
    layer = part["rows"][0]["layer"]
    head = (
        f"Measured on {part['date']}: {part['device']}, {part['threads']} threads, PyTorch"
        f" {part['versions']['torch']}; B = {layer['B']}, H = P = {layer['H']}, d = {layer['d']},"
        f" {layer['dtype']}, flat causality. Medians; the spread is over the rounds, in which the"
        " implementations alternate."
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
            taken = (median(row, "local", label) for label in (FORWARD, BOTH))
            line += [str(row["layer"]["window"])]
            line += ["" if time is None else f"{time / N * 1e6:.1f}" for time in taken]
        alone.append(line)
    row = next(row for (about, _), row in rows.items() if about == "global")
    memory = [
        [
            f"`{name}`",
            mib(peak(row, name)),
            seconds(median(row, name, BOTH)),
        ]
        for name in ("sdpa", "streamed")
    ]
    less, time = peak_ratio(row, "streamed", "sdpa"), ratio(row, "streamed", "sdpa", BOTH)
    memory.append(["`streamed` / `sdpa`", f"**{times(less)}**", times(time)])
    given = Layer(**row["layer"])
    base = given.floor_bytes() // 4
    return f"""{wrap(head)}

**A window layer against the published recipe** (einsum, interleave, SDPA with a dense window mask
over N·P × N·P made beforehand, einsum), W = N/(2P²):

{Table(["N", "W", "pass", "published recipe", "`local`", "times faster"], against).markdown()}

**`local` alone, microseconds per token**: with a fixed window on the left, with W = N/(2P²) on the
right, where a token sees twice as much each time N doubles.

{Table(["N", *(["W", "forward", "forward + backward"] * 2)], alone).markdown()}

**A global layer, forward + backward, N = {given.N}**: peak memory beyond the inputs,
their gradients included. A base tensor has {mib(base)}, a pseudo
tensor {mib(base * given.P)}.

{Table(["backend", "peak memory", "time"], memory).markdown()}
"""


def _faster(row: Record, label: str) -> str:
    first, second = (row["implementations"][name][label]["seconds"] for name in (RECIPE, "local"))
    each = [a / b for a, b in zip(first, second, strict=True)]
    return f"**{ratio(row, RECIPE, 'local', label):.1f}** ({min(each):.1f} to {max(each):.1f})"


def gpu_tables(record: Record) -> str:
    """Show what `iha bench` measured on a GPU, every implementation of every row."""
    parts: list[str] = []
    for name, part in record["cases"].items():
        quick = " Tiny sizes (`--quick`)." if part["quick"] else ""
        parts.append(f"**Case `{name}`**: {bench_tables.heading(part)}.{quick}")
        for table in bench_tables.tables(part):
            parts += [f"*{table.title}*", table.markdown()]
            parts += [wrap(reason) for reason in table.note.splitlines()]
    return "\n\n".join((*parts, bench_tables.CAPTION)) + "\n"


def against_plain_table(record: Record) -> str:
    """Show steps of whole models as ratios to the plain one, beside what FLOPs alone predict."""
    lines: list[list[str]] = []
    for row in record["rows"]:
        peaks = row.get("peak", {})
        for who, found in row["ratios"].items():
            more = times(peaks[who] / peaks["plain"]) if peaks else ""
            counted = times(row.get("counted", {}).get(who))
            lines.append([row["case"], who, counted, f"**{found:.2f}**", more])
    columns = ["", "model", "counted FLOPs", "time", "peak memory of the step"]
    head = (
        "**Whole models, as ratios to the plain model** (`iha bench against-plain`), on"
        f" {record['date']}: {record['device']}, {record['threads']} threads. Training steps"
        " (forward and backward) are on the paper's schedule. Counted are all FLOPs of a model,"
        " projections included: what the step would cost if every FLOP cost the same."
    )
    return f"{wrap(head)}\n\n{Table(columns, lines).dense().markdown()}"


def traffic_table() -> str:
    """Show the bytes that a forward pass moves besides its attention kernel's own, counted."""
    N, H, d = 8192, 20, 128
    lines: list[list[str]] = []
    for P, Pq in ((2, 2), (4, 4), (4, 1), (8, 8)):
        before, after = (
            moved(N, H, H, d, P, pseudo_queries=Pq, itemsize=2, copies=copies)
            for copies in (True, False)
        )
        lines.append([str(P), str(Pq), mib(before), mib(after), f"{after / before:.2f}"])
    columns = ["P", "pseudo-queries", "with copies", "tokens-major", "ratio"]
    head = (
        "**Bytes that a forward pass of `flash`, `sdpa` or `local` moves**, counted, not measured"
        " (`iha_lab.bench.traffic`): pseudo tensors written by a product, turned by a phase, read"
        " by the attention, its output collapsed. With copies each is interleaved once more, as"
        f" before they were written tokens-major. N = {N}, H = G = {H}, d = {d}, bfloat16."
    )
    return f"{wrap(head)}\n\n{Table(columns, lines).markdown()}"


NOT_MEASURED = """**The fused kernels**: not measured on a GPU. Where there is one, `make bench`
measures every backend on it and writes its table here.
"""


def quickstart_table(result: Record) -> str:
    """Show what `iha quickstart` measured, from its result.json."""
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
    return (
        "\n\n".join((wrap(head), Table(columns, rows).markdown(), wrap(result["verdict"]))) + "\n"
    )


def measured(results: Path = ROOT / "results") -> str:
    """Write the three numbers of README: exactness, speed against the recipe, memory."""
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
    """Write everything that was measured, for docs/benchmarks.md."""
    on_cpu = results / "bench" / "bench-cpu.json"
    gpus = [file for file in sorted(results.glob("bench/bench-*.json")) if file != on_cpu]
    parts = [
        against_plain_table(_read(results / "bench" / "against-plain.json")),
        cpu_tables(_read(on_cpu)["cases"]["cpu"]),
        traffic_table(),
        *([gpu_tables(_read(file)) for file in gpus] or [NOT_MEASURED]),
        quickstart_table(_read(results / "quickstart" / "quickstart.json")),
    ]
    return "\n\n".join(parts).rstrip()


def choosing(results: Path = ROOT / "results") -> str:
    """Show what P costs, for docs/own-model.md: computed, and measured where a step was timed."""
    file, H, d, L = results / "bench" / "against-plain.json", 8, 64, 5
    steps: Record = {}
    if file.exists():
        rows = [row for row in _read(file)["rows"] if f"width {H * d}," in row["case"]]
        steps = {row["case"].split(" x ")[1].split()[0]: row["ratios"] for row in rows}
    lines: list[list[str]] = []
    for N in (1024, 2048, 8192):
        for P in (2, 4, 8):
            schedule = iha.hybrid_schedule(L, N, P)
            whole = iha.attention_flops(N, H, d, P) / iha.attention_flops(N, H, d)
            matched = schedule.flops(H, d) / schedule.plain_flops(H, d)
            taken = steps.get(str(N), {}).get(f"P = {P}")
            tensors = iha.HeadMixing(H, pseudo_heads=P, init="scratch").parameter_count()
            measured = "" if taken is None else times(taken)
            row = [N, P, schedule.window, f"{tensors:,}", times(whole), times(matched), measured]
            lines.append([str(cell) for cell in row])
    columns = ["N", "P", "W", "mixing parameters a layer", "FLOPs, global", "FLOPs, schedule"]
    table = Table([*columns, "training step, measured"], lines).dense()
    note = (
        f"H = G = {H}, d = {d}. FLOPs are of attention with its mixing, as a ratio to plain"
        " attention (`iha.attention_flops`); the schedule is the paper's, with W = N/(2P²)."
    )
    if steps:
        note += (
            f" The training step is that of a whole model of width {H * d} with {L} layers on the"
            " schedule, as a ratio to the plain model, on a CPU with two threads"
            " (`results/bench/against-plain.json`)."
        )
    return f"{table.markdown()}\n\n{wrap(note)}"


PAGES = {
    "README.md": ("measured", measured),
    "docs/benchmarks.md": ("results", tables),
    "docs/scale-out.md": ("counted", lambda _: scale_out_tables.counted()),
    "docs/serving.md": ("measured", serving_tables.tables),
    "docs/own-model.md": ("choosing", choosing),
}


def rendered(name: str, results: Path = ROOT / "results") -> str:
    """Return the page called `name`, with what the result files say now between its markers."""
    marker, write = PAGES[name]
    begin, end = (f"<!-- {marker}:{edge} -->" for edge in ("begin", "end"))
    before, rest = (ROOT / name).read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{write(results)}\n\n{end}{after}"


def _read(file: Path) -> Record:
    return json.loads(file.read_text())


def main() -> None:
    for name in PAGES:
        generated(ROOT / name, rendered(name), "iha_lab.report.readme")


if __name__ == "__main__":
    main()
