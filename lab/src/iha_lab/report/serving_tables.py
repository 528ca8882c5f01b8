"""The tables of docs/serving.md: what was measured through vLLM, and what can be counted."""

from __future__ import annotations

import json
import statistics
import textwrap
from pathlib import Path

from iha.schedule import attention_flops, hybrid_schedule
from iha_lab.bench.measure import Record
from iha_lab.report.bench_tables import seconds, times
from iha_lab.report.tables import Table

# Llama 3.1 8B in bfloat16.
LAYERS, H, G, D, BYTES = 32, 32, 8, 128, 2
TOKENS, P, RANKS = 131_072, 2, 8
NOT_MEASURED = "Throughput, time to first token and memory were not measured yet."


def measured(record: Record) -> str:
    """Show throughput, time to first token, and the memory of prompts."""
    rows: list[list[str]] = []
    for row in record["rows"]:
        plain, iha = (statistics.median(row["seconds"][name]) for name in ("plain", "iha"))
        each = [
            slow / fast
            for fast, slow in zip(row["seconds"]["plain"], row["seconds"]["iha"], strict=True)
        ]
        spread = f"{times(iha / plain)} ({min(each):.1f} to {max(each):.1f})"
        if row["new"] == 1:
            shown = ("time to first token, 1 request", seconds(plain), seconds(iha))
        else:
            made = row["requests"] * row["new"]
            rates = (f"{made / taken:.1f} tokens/s" for taken in (plain, iha))
            shown = (f"throughput, {row['requests']} at once", *rates)
        rows.append([*shown, spread])
    columns = ["", "plain model", f"IHA, P = {record['pseudo_heads']}", "time, IHA / plain"]
    memory = [[str(r["tokens"]), str(r["chunk"]), f"{r['peak_mib']} MiB"] for r in record["memory"]]
    head = (
        f"Measured on {record['date']}: {record['device']}, {record['cores']} cores,"
        f" {_versions(record)}. {record['layers']} layers, hidden size {record['hidden']}, IHA"
        f" without windows in every layer, float32, prompts of {record['prompt']} tokens,"
        f" {record['rows'][-1]['new']} new ones. Medians; the two engines take turns, and the"
        " spread is over the rounds."
    )
    return f"""{textwrap.fill(head, 100)}

{Table(columns, rows).markdown()}

Memory of one prompt in one layer of SmolLM2-135M's shape, P = 4, beyond weights and cache:

{Table(["tokens", "chunk", "peak"], memory).markdown()}"""


def _versions(record: Record) -> str:
    versions = record["versions"]
    engine = next(name for name in versions if name.startswith("vllm"))
    return f"{engine} {versions[engine]}, PyTorch {versions['torch']}"


def counted() -> str:
    """Show the arithmetic of a long prompt and of tensor parallelism, for Llama 3.1 8B's shape."""
    cache = 2 * LAYERS * G * D * BYTES * TOKENS
    plain = LAYERS * attention_flops(TOKENS, H, D)
    schedule = hybrid_schedule(LAYERS, TOKENS, P)
    everywhere = LAYERS * attention_flops(TOKENS, H, D, P, num_kv_heads=G)
    ours = schedule.flops(H, D, G)
    window = attention_flops(TOKENS, H, D, P, num_kv_heads=G, window=1024)
    few = LAYERS // 8
    short = (LAYERS - few) * window + few * attention_flops(TOKENS, H, D, P, num_kv_heads=G)
    rows = [
        [about, f"{cache / 2**30:.0f} GiB", f"{flops:.2e}", times(flops / plain)]
        for about, flops in (
            ("plain", plain),
            (f"IHA, P = {P}, every layer global", everywhere),
            (
                f"IHA in {len(schedule.layers)} layers with W = {schedule.window}, others plain",
                ours,
            ),
            (f"IHA, W = 1024, but {few} layers global", short),
        )
    ]
    columns = ["layers", "cache", "FLOPs of attention, whole prompt", "of plain"]
    moved = (RANKS - 1) * BYTES / RANKS / 1024  # KiB, of a number that each rank lacks in part
    gathered, reduced = (H + 2 * G + H) * D * moved, (P * (H + 2 * G) + H) * D * moved
    traffic = [
        ["all-gather of Q, new K and V; reduce-scatter of the output", f"{gathered:.1f} KiB",
         f"{cache / 2**30:.0f} GiB"],
        [f"reduce-scatter of pseudo-heads, P = {P}, and of the output", f"{reduced:.1f} KiB",
         f"{P * cache / RANKS / 2**30:.0f} GiB"],
    ]  # fmt: skip
    head = (
        f"Counted for Llama 3.1 8B's shape ({LAYERS} layers, H = {H}, G = {G}, d = {D}, bfloat16)"
        f" and {TOKENS:,} tokens. The cache holds base keys and values, so it is the plain model's"
        " in every row:"
    )
    parallel = (
        f"Tensor parallelism over {RANKS} devices, for each token, layer and device, if it were"
        " built. Mixing needs all heads: either they are gathered, and each device caches all of"
        " them, or each device adds its share of every pseudo-head, and pseudo-heads are cached:"
    )
    return f"""{textwrap.fill(head, 100)}

{Table(columns, rows).markdown()}

{textwrap.fill(parallel, 100)}

{Table(["", "traffic", "cache of a device"], traffic).markdown()}"""


def tables(results: Path) -> str:
    """Write what docs/serving.md shows between its markers."""
    file = results / "bench" / "serving.json"
    found = measured(json.loads(file.read_text())) if file.exists() else NOT_MEASURED
    return f"{found}\n\n{counted()}"
