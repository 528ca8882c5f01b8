"""All cases in order: check, then time, then memory; written to a file as it comes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

from iha_lab.bench import ceilings, measure, training_step
from iha_lab.bench.cases import FLASH_MHA, MHA, MIXED, PLAIN, Case, Layer, Model, case
from iha_lab.bench.implementations import (
    ALLOWED,
    Attention,
    check_layer,
    differences,
    implementation,
    inputs,
    names,
    once,
    refusal,
)
from iha_lab.bench.measure import BOTH, FORWARD, STEP, Record
from iha_lab.files import write_text
from iha_lab.machine import device_name, machine
from iha_lab.run_folder import claim

Say = Callable[[str], None]


def bench(
    names: tuple[str, ...], device: torch.device, output: Path, quick: bool, say: Say
) -> Record:
    """Measure the cases `names` on `device`; return what the file in `output` then holds.

    One file a device, `bench-DEVICE.json`, with a part for each case that carries its own date,
    versions and ceilings: another run replaces its own cases and leaves the others. It is
    written after every row, so a run that is stopped leaves what it measured.

    Raises ValueError for a name of no case, and where `output` holds something else.
    """
    parts = {name: case(name, quick) for name in names}  # a wrong name is said before any work
    with claim(output, {"command": "iha bench"}):
        return _bench(parts, device, output / f"bench-{slug(device)}.json", quick, say)


def _bench(
    parts: dict[str, Case], device: torch.device, file: Path, quick: bool, say: Say
) -> Record:
    record: Record = json.loads(file.read_text()) if file.exists() else {"cases": {}}
    for name, rows in parts.items():
        say(f"{name}: measuring the machine's own ceilings")
        part: Record = {
            "quick": quick,
            **machine(device),
            **_ceilings(rows, device, quick),
            "rows": [],
        }
        record["cases"][name] = part
        for number, row in enumerate(rows, 1):
            say(f"{name} {number}/{len(rows)}: {row.title()}")
            measured = _layer if isinstance(row, Layer) else _model
            part["rows"].append(measured(row, device, quick))  # pyright: ignore[reportArgumentType]
            write_text(file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return record


def slug(device: torch.device) -> str:
    """Name a device for a file: `cpu`, or its own name."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _ceilings(rows: tuple[Layer | Model, ...], device: torch.device, quick: bool) -> Record:
    dtypes = dict.fromkeys(row.dtype for row in rows)
    return {
        "bytes_per_second": ceilings.copy_bytes_per_second(device, quick),
        "flops_per_second": {
            dtype: ceilings.matmul_flops_per_second(device, dtype, quick) for dtype in dtypes
        },
    }


def _effort(device: torch.device, quick: bool) -> dict[str, Any]:
    """Choose rounds at most, and about how many seconds all implementations of a row may take."""
    if quick:
        return {"rounds": 3, "budget": 5.0}
    return {"rounds": 11 if device.type == "cpu" else 30, "budget": 30.0}


def _layer(layer: Layer, device: torch.device, quick: bool) -> Record:
    if device.type == "cuda":
        torch.compiler.reset()  # after a few shapes it would stop compiling, without a word
    small = check_layer(layer)
    found: dict[str, Record] = {name: {} for name in names(layer, device)}
    running: dict[str, Attention] = {}
    for name, told in found.items():
        with _telling(told, device):
            _raise_refusal(refusal(name, layer, inputs(layer, device)))
            if name not in (MHA, FLASH_MHA):
                told["differences"] = differences(
                    implementation(name, small, device), small, device
                )
                _raise_refusal(_wrong(told["differences"], ALLOWED[layer.dtype]))
            running[name] = implementation(name, layer, device)
    for label, requires_grad in ((FORWARD, False), (BOTH, True)):
        if requires_grad and layer.decodes:
            continue
        tensors = inputs(layer, device, requires_grad=requires_grad)
        actions: dict[str, Callable[[], object]] = {}
        for name, attention in running.items():
            with _telling(found[name].setdefault(label, {}), device):
                _raise_refusal(refusal(name, layer, tensors))
                actions[name] = once(attention, tensors)
        for name, times in measure.race(actions, device, **_effort(device, quick)).items():
            found[name][label] = times
    able = [name for name in running if "median" in found[name].get(BOTH, found[name][FORWARD])]
    del running
    for name in able:  # of the longest pass, beyond the inputs, their gradients included
        with _telling(found[name].setdefault("peak", {}), device):
            found[name]["peak"]["bytes"] = _peak(name, layer, device)
    return {
        "layer": dataclasses.asdict(layer),
        "check": {"N": small.N, "S": small.keys, "window": small.window},
        "flops": layer.flops(),
        "floor_bytes": layer.floor_bytes(),
        "cache_bytes": layer.cache_bytes(),
        "implementations": found,
    }


class _Refused(Exception):
    """Carries the sentence that says why something is not run."""


def _raise_refusal(why_not: str | None) -> None:
    if why_not is not None:
        raise _Refused(why_not)


@contextlib.contextmanager
def _telling(told: Record, device: torch.device) -> Generator[None]:
    """Put what goes wrong into `told`, whatever it is: the others go on."""
    try:
        yield
    except _Refused as refused:
        told["why_not"] = str(refused)
    except Exception as error:
        measure.release(device)
        told["why_not"] = measure.reason(error)


def _wrong(found: dict[str, float], allowed: float) -> str | None:
    """Say what differs too much from `reference`; None if nothing does."""
    worst = max(found, key=lambda what: math.inf if math.isnan(found[what]) else found[what])
    # Not `>`: a difference that is no number is no agreement.
    if found[worst] <= allowed:
        return None
    return (
        f"its {worst} differs from reference by {found[worst]:.1e} of the norm (allowed:"
        f" {allowed}), so it was not timed"
    )


def _peak(name: str, layer: Layer, device: torch.device) -> int:
    if device.type != "cuda":
        described = json.dumps(dataclasses.asdict(layer))
        return measure.in_a_process("iha_lab.bench.peak_memory", described, name)
    tensors = inputs(layer, device, requires_grad=not layer.decodes)
    return measure.device_peak(once(implementation(name, layer, device), tensors), device)


def _model(model: Model, device: torch.device, quick: bool) -> Record:
    found: dict[str, Record] = {PLAIN: {}, MIXED: {}}
    actions: dict[str, Callable[[], object]] = {}
    for name, build in ((PLAIN, training_step.plain), (MIXED, training_step.mixed)):
        with _telling(found[name], device):
            built = build(model, device)
            found[name]["parameters"] = sum(p.numel() for p in built.parameters())
            actions[name] = training_step.step(built, model, device)
    for name, times in measure.race(actions, device, **_effort(device, quick)).items():
        found[name][STEP] = times
        if "median" not in times:
            continue
        found[name]["tokens_per_second"] = model.B * model.N / times["median"]
        if device.type == "cuda":
            found[name]["peak"] = {"bytes": measure.device_peak(actions[name], device)}
    return {"model": dataclasses.asdict(model), "implementations": found}
