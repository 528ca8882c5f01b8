"""Steps of whole models as ratios to the plain model: the case `against-plain` of `iha bench`.

    python -m iha_lab.bench.against_plain NAME    # prints the peak bytes of a decoding step

Training steps (forward and backward) on the paper's FLOP-matched schedule, and one decoded token
after 8192 cached ones in an upcycled model of SmolLM2's shape. Every model takes its turn in each
round, so that a noisy machine disturbs all alike; what counts are medians. `counted` is what FLOPs
alone predict: those of the whole model, attention, mixing and projections, as a ratio.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import iha
from iha_lab.bench.measure import in_a_process, race, resident_peak
from iha_lab.files import write_text
from iha_lab.machine import machine

NAME = "against-plain"
CACHED = 8192
# Hidden size, heads, intermediate size, tokens, batch, and P of each model beside the plain one.
LAYERS = 5
DECODED = {"plain": None, "P = 2": 2, "P = 4": 4}
STEPS = ((128, 4, 384, 256, 8, (4,)), (512, 8, 1408, 1024, 1, (2, 4, 8)))


def plain(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=1024, max_position_embeddings=32768, **settings))


def training_steps() -> dict[str, tuple[dict[str, Callable[[], object]], dict[str, int]]]:
    """For each model size, a step of each model, the plain one first, and its counted FLOPs."""
    found: dict[str, tuple[dict[str, Callable[[], object]], dict[str, int]]] = {}
    for width, heads, intermediate, N, batch, pseudo_heads in STEPS:
        shape = {
            "hidden_size": width,
            "intermediate_size": intermediate,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": heads,
        }
        tokens = torch.randint(1024, (batch, N))
        base = plain(**shape)
        steps: dict[str, Callable[[], object]] = {"plain": functools.partial(train, base, tokens)}
        products = 2 * N * sum(p.numel() for p in base.parameters() if p.ndim == 2)
        flops = {"plain": products + LAYERS * iha.attention_flops(N, heads, width // heads)}
        for P in pseudo_heads:
            schedule = iha.hybrid_schedule(LAYERS, N, P)
            options: Any = {"layers": schedule.layers, "window": schedule.window}
            model = iha.upcycle(plain(**shape), P, init="scratch", rope="virtual", **options)
            steps[f"P = {P}"] = functools.partial(train, model, tokens)
            flops[f"P = {P}"] = products + schedule.flops(heads, width // heads)
        found[f"training step, width {width}, {batch} x {N} tokens"] = steps, flops
    return found


def train(model: Any, tokens: torch.Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad()


def decoding_step(P: int | None) -> Callable[[], object]:
    """One token in a model upcycled at `P`, or in the plain one."""
    shape = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    model = plain(**shape) if P is None else iha.upcycle(plain(**shape), P)
    cache = DynamicCache(config=model.config)
    for layer in range(6):
        cache.update(torch.randn(1, 3, CACHED, 64), torch.randn(1, 3, CACHED, 64), layer)
    return functools.partial(decode, model.eval(), cache)


@torch.no_grad()
def decode(model: Any, cache: DynamicCache) -> None:
    model(torch.tensor([[5]]), past_key_values=cache)


def peak(name: str) -> int:
    """Peak bytes of a decoding step beyond model and cache, in a process of its own."""
    step = decoding_step(DECODED[name])
    step()  # what is loaded once belongs to no step
    return resident_peak(step)


def bench(output: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure on the CPU, write `output`/against-plain.json and return what it holds."""
    device = torch.device("cpu")
    decoding = {name: decoding_step(P) for name, P in DECODED.items()}
    cases = {**training_steps(), f"decoded token after {CACHED}": (decoding, {})}
    record: dict[str, Any] = {**machine(device), "rows": []}
    for name, (steps, flops) in cases.items():
        times = race(steps, device, rounds=15, budget=75.0)
        base = times["plain"]["median"]
        row: dict[str, Any] = {"case": name, "times": times, "ratios": {}, "counted": {}}
        for who in list(steps)[1:]:
            row["ratios"][who] = times[who]["median"] / base
            if flops:
                row["counted"][who] = flops[who] / flops["plain"]
        if steps is decoding:
            row["peak"] = {who: in_a_process("iha_lab.bench.against_plain", who) for who in steps}
        record["rows"].append(row)
        say(described(row))
    write_text(output / f"{NAME}.json", json.dumps(record, indent=1) + "\n")
    return record


def described(row: dict[str, Any]) -> str:
    """Say a row in a line: measured ratios, what FLOPs alone predict, and peak memory."""
    told = [
        f"{who} {ratio:.2f}" + (f" (counted {row['counted'][who]:.2f})" if row["counted"] else "")
        for who, ratio in row["ratios"].items()
    ]
    peaks = [f"{who} {size / 2**20:.1f} MiB" for who, size in row.get("peak", {}).items()]
    memory = f"; peak memory beyond model and cache: {', '.join(peaks)}" if peaks else ""
    return f"{row['case']}, as a ratio to the plain model: {', '.join(told)}{memory}"


if __name__ == "__main__":
    print(peak(sys.argv[1]))
