"""Steps of whole models as ratios to the plain model, into results/bench/against-plain.json.

Training steps (forward and backward) on the paper's FLOP-matched schedule, and one decoded token
after 8192 cached ones in an upcycled model of SmolLM2's shape. Every model takes its turn in each
round, on two threads, so that a noisy machine disturbs all alike; what counts are medians.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import iha
from iha_lab.bench.measure import race
from iha_lab.files import write_text
from iha_lab.machine import machine

RESULT = Path(__file__).parents[4] / "results" / "bench" / "against-plain.json"
CACHED = 8192
# Hidden size, heads, intermediate size, tokens, batch, and P of each model beside the plain one.
STEPS = ((128, 4, 384, 256, 8, (4,)), (512, 8, 1408, 1024, 1, (2, 4, 8)))


def plain(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=1024, max_position_embeddings=32768, **settings))


def training_steps() -> dict[str, dict[str, Callable[[], object]]]:
    """For each model size, a step of the plain model and of those on the schedule."""
    found: dict[str, dict[str, Callable[[], object]]] = {}
    for width, heads, intermediate, N, batch, pseudo_heads in STEPS:
        shape = {
            "hidden_size": width,
            "intermediate_size": intermediate,
            "num_hidden_layers": 5,
            "num_attention_heads": heads,
        }
        tokens = torch.randint(1024, (batch, N))
        steps: dict[str, Callable[[], object]] = {
            "plain": functools.partial(train, plain(**shape), tokens)
        }
        for P in pseudo_heads:
            schedule = iha.hybrid_schedule(5, N, P)
            options: Any = {"layers": schedule.layers, "window": schedule.window}
            model = iha.upcycle(plain(**shape), P, init="scratch", rope="virtual", **options)
            steps[f"P = {P}"] = functools.partial(train, model, tokens)
        found[f"training step, width {width}, {batch} x {N} tokens"] = steps
    return found


def train(model: Any, tokens: torch.Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad()


def decoding_steps() -> dict[str, Callable[[], object]]:
    shape = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    models = {"plain": plain(**shape)}
    models |= {f"P = {P}": iha.upcycle(plain(**shape), P) for P in (2, 4)}
    steps: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        cache = DynamicCache(config=model.config)
        for layer in range(6):
            cache.update(torch.randn(1, 3, CACHED, 64), torch.randn(1, 3, CACHED, 64), layer)
        steps[name] = functools.partial(decode, model.eval(), cache)
    return steps


@torch.no_grad()
def decode(model: Any, cache: DynamicCache) -> None:
    model(torch.tensor([[5]]), past_key_values=cache)


def main() -> None:
    torch.set_num_threads(2)
    device = torch.device("cpu")
    rows: list[dict[str, Any]] = []
    cases = {**training_steps(), f"decoded token after {CACHED}": decoding_steps()}
    for name, steps in cases.items():
        times = race(steps, device, rounds=15, budget=75.0)
        base = times["plain"]["median"]
        ratios = {who: found["median"] / base for who, found in times.items() if who != "plain"}
        rows.append({"case": name, "times": times, "ratios": ratios})
        print(name, {who: round(ratio, 2) for who, ratio in ratios.items()}, flush=True)
    write_text(RESULT, json.dumps({**machine(device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
