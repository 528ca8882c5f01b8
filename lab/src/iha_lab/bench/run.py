"""All cases in order: check, then time, then memory; written to a file as it comes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from iha_lab.bench import ceilings, contestants, peak
from iha_lab.bench.cases import MIXED, PLAIN, Layer, Model, case
from iha_lab.bench.measure import device_peak, race, reason, release
from iha_lab.bench.record import BOTH, FORWARD, STEP, Record
from iha_lab.files import write_text
from iha_lab.machine import device_name, machine

Say = Callable[[str], None]


def bench(
    names: tuple[str, ...], device: torch.device, output: Path, quick: bool, say: Say
) -> Record:
    """Measure the cases `names` on `device`; return what the file in `output` then holds.

    One file a device, `bench-DEVICE.json`, with a part for each case that carries its own date,
    versions and ceilings: another run replaces its own cases and leaves the others. It is
    written after every row, so a run that is stopped leaves what it measured.
    """
    parts = {name: case(name, quick) for name in names}  # a wrong name is said before any work
    file = output / f"bench-{slug(device)}.json"
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
    """`cpu`, or the device's name for a file name."""
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
    """Rounds at most, and about how many seconds for all contestants of a row together."""
    if quick:
        return {"rounds": 3, "budget": 5.0}
    return {"rounds": 11 if device.type == "cpu" else 30, "budget": 30.0}


def _layer(layer: Layer, device: torch.device, quick: bool) -> Record:
    if device.type == "cuda":
        torch.compiler.reset()  # after a few shapes it would stop compiling, without a word
    small = contestants.check_layer(layer)
    found: dict[str, Record] = {}
    running: dict[str, contestants.Attention] = {}
    for name in contestants.names(layer, device):
        found[name] = {}
        why_not = contestants.refusal(name, layer, contestants.inputs(layer, device))
        if why_not is None:
            why_not = _prepared(name, layer, small, device, running, found[name])
        if why_not is not None:
            found[name]["why_not"] = why_not
    for label, requires_grad in ((FORWARD, False), (BOTH, True)):
        if requires_grad and layer.decodes:
            continue
        tensors = contestants.inputs(layer, device, requires_grad=requires_grad)
        actions: dict[str, Callable[[], object]] = {}
        for name, attention in running.items():
            why_not = contestants.refusal(name, layer, tensors)
            if why_not is None:
                actions[name] = contestants.once(attention, tensors)
            else:
                found[name][label] = {"why_not": why_not}
        for name, times in race(actions, device, **_effort(device, quick)).items():
            found[name][label] = times
    able = [name for name in running if "median" in found[name].get(BOTH, found[name][FORWARD])]
    del running
    for name, bytes_needed in _peaks(able, layer, device):
        found[name]["peak"] = bytes_needed
    return {
        "layer": dataclasses.asdict(layer),
        "check": {"N": small.N, "S": small.keys, "window": small.window},
        "flops": layer.flops(),
        "floor_bytes": layer.floor_bytes(),
        "cache_bytes": layer.cache_bytes(),
        "contestants": found,
    }


def _prepared(
    name: str,
    layer: Layer,
    small: Layer,
    device: torch.device,
    running: dict[str, contestants.Attention],
    row: Record,
) -> str | None:
    """Check `name` and put it into `running`, or say why not."""
    try:
        if name not in (contestants.MHA, contestants.FLASH_MHA):
            tried = contestants.contestant(name, small, device)
            row["differences"] = contestants.differences(tried, small, device)
            worst = max(row["differences"], key=lambda what: row["differences"][what])
            # Not `>`: a difference that is no number is no agreement.
            if not row["differences"][worst] <= contestants.ALLOWED[layer.dtype]:
                return (
                    f"its {worst} differs from reference by {row['differences'][worst]:.1e} of the"
                    f" norm (allowed: {contestants.ALLOWED[layer.dtype]}), so it was not timed"
                )
        running[name] = contestants.contestant(name, layer, device)
    except Exception as error:  # whatever it is: the others go on
        release(device)
        return reason(error)
    return None


def _peaks(able: list[str], layer: Layer, device: torch.device) -> Iterator[tuple[str, Record]]:
    """Bytes beyond the inputs, their gradients included, of the longest pass."""
    for name in able:
        try:
            if device.type == "cuda":
                tensors = contestants.inputs(layer, device, requires_grad=not layer.decodes)
                action = contestants.once(contestants.contestant(name, layer, device), tensors)
                yield name, {"bytes": device_peak(action, device)}
            else:
                yield name, {"bytes": peak.in_a_process(name, layer)}
        except Exception as error:  # whatever it is: the others go on
            yield name, {"why_not": reason(error)}


def _model(model: Model, device: torch.device, quick: bool) -> Record:
    from iha_lab.bench import model as models

    found: dict[str, Record] = {}
    actions: dict[str, Callable[[], object]] = {}
    for name, build in ((PLAIN, models.plain), (MIXED, models.mixed)):
        found[name] = {}
        try:
            built = build(model, device)
            found[name]["parameters"] = sum(p.numel() for p in built.parameters())
            actions[name] = models.training_step(built, model, device)
        except Exception as error:  # whatever it is: the other goes on
            found[name]["why_not"] = reason(error)
    for name, times in race(actions, device, **_effort(device, quick)).items():
        found[name][STEP] = times
        if device.type == "cuda" and "median" in times:
            found[name]["peak"] = {"bytes": device_peak(actions[name], device)}
        if "median" in times:
            found[name]["tokens_per_second"] = model.B * model.N / times["median"]
    return {"model": dataclasses.asdict(model), "contestants": found}
