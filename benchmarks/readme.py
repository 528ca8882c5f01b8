"""Render benchmarks/results/*.json into README.md, between its markers.

`python benchmarks/readme.py` rewrites README.md; with `--check` it only exits with status 1 where
README.md is out of date.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iha.lab.retrieval import Accuracy

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
MIB = 2**20


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def wrap(text: str) -> str:
    return textwrap.fill(text, 100)


def seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def operator_tables(result: dict[str, Any]) -> str:
    """The three tables of bench_operator.py."""
    machine, shape = result["machine"], result["shape"]
    head = (
        f"Measured on {result['date']}: {machine['cpu']}, {machine['threads']} threads, PyTorch"
        f" {machine['torch']}; B = {shape['B']}, H = P = {shape['H']}, d = {shape['d']},"
        f" {shape['dtype']}, {shape['causal']} causality. Medians; the spread is over the rounds,"
        " in which the contestants alternate."
    )
    rows = [
        [
            str(row["tokens"]),
            str(row["window"]),
            row["pass"],
            seconds(row["median_seconds"]["recipe"]),
            seconds(row["median_seconds"]["local"]),
            f"**{row['ratio']:.1f}** ({min(row['ratio_of_each_round']):.1f} to"
            f" {max(row['ratio_of_each_round']):.1f})",
        ]
        for row in result["local_against_recipe"]
    ]
    against = table(["N", "W", "pass", "published recipe", "`local`", "times faster"], rows)

    alone = {(r["rule"], r["tokens"], r["pass"]): r for r in result["local_alone"]}
    rows = []
    for tokens in dict.fromkeys(row["tokens"] for row in result["local_alone"]):
        line = [str(tokens)]
        for rule in ("fixed", "N/(2P²)"):
            both = [alone[rule, tokens, name] for name in ("forward", "forward + backward")]
            line += [str(both[0]["window"])]
            line += [f"{row['microseconds_per_token']:.1f}" for row in both]
        rows.append(line)
    linear = table(["N", *(["W", "forward", "forward + backward"] * 2)], rows)

    streamed = result["streamed_against_sdpa"]
    peaks, times = streamed["median_peak_bytes"], streamed["time"]["median_seconds"]
    rows = [
        [f"`{name}`", f"{peaks[name] / MIB:.0f} MiB", seconds(times[name])]
        for name in ("sdpa", "streamed")
    ]
    rows.append(
        [
            "`streamed` / `sdpa`",
            f"**{streamed['peak_ratio']:.2f}**",
            f"{streamed['time']['ratio']:.2f}",
        ]
    )
    memory = table(["backend", "peak memory", "time"], rows)
    return f"""{wrap(head)}

**A window layer against the published recipe** (einsum, interleave, SDPA with a dense window mask
over N·P × N·P made beforehand, einsum), W = N/(2P²):

{against}

**`local` alone, microseconds per token**: with a fixed window on the left, with W = N/(2P²) on the
right, where a token sees twice as much each time N doubles.

{linear}

**A global layer, forward + backward, N = {streamed["tokens"]}**: peak memory beyond the inputs,
their gradients included. A base tensor has {streamed["base_tensor_bytes"] / MIB:.0f} MiB, a pseudo
tensor {streamed["pseudo_tensor_bytes"] / MIB:.0f} MiB.

{memory}
"""


def quickstart_table(result: dict[str, Any]) -> str:
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


RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "operator": operator_tables,
    "quickstart": quickstart_table,
}


def rendered(readme: str) -> str:
    """README with what the result files say now."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    results = (ROOT / "benchmarks" / "results").glob("*.json")
    parts = [RENDER[file.stem](json.loads(file.read_text())) for file in sorted(results)]
    return "\n".join((before + BEGIN, *(f"\n{part}" for part in parts), END + after))


def main() -> None:
    path = ROOT / "README.md"
    readme = path.read_text()
    now = rendered(readme)
    if sys.argv[1:] == ["--check"]:
        if now != readme:
            sys.exit("README.md is out of date; run python benchmarks/readme.py.")
        return
    path.write_text(now)


if __name__ == "__main__":
    main()
