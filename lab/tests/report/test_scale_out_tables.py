"""What the page on scaling out counts, against figures put together by hand."""

from __future__ import annotations

import pytest

from iha_lab.report.scale_out_tables import counted

BASE, LAYERS, WINDOWED = 8192 * 2560 * 2, 26, 21


def cells(*names: str) -> list[str]:
    """Return what stands in the row that begins with these."""
    lines = [line.strip("| ").split(" | ") for line in counted().splitlines() if "|" in line]
    return next(line[len(names) :] for line in lines if tuple(line[: len(names)]) == names)


def gib(cell: str) -> float:
    return float(cell.removesuffix(" GiB"))


def test_traffic_of_one_node() -> None:
    """8 or 12 base tensors a layer, 7/8 of each; a ring of 6 and a halo of 4 times W tokens."""
    _, plain, _, ours = map(gib, cells("8", "TP 8 + FSDP2"))
    assert plain == pytest.approx(7 / 8 * 8 * LAYERS * BASE / 2**30, abs=0.006)
    assert ours == pytest.approx(7 / 8 * 12 * LAYERS * BASE / 2**30, abs=0.006)
    fsdp, both = map(gib, cells("8", "FSDP2")[1::2])
    assert fsdp == pytest.approx(7 / 8 * 8 * 2.39e9 / 2**30, rel=0.01)
    _, plain, _, ours = map(gib, cells("8", "CP 8 + FSDP2"))
    ring, halo = 7 / 8 * 6 * BASE, 4 * 10 * 2560 * 2
    assert plain == pytest.approx(fsdp + LAYERS * ring / 2**30, abs=0.011)
    few = LAYERS - WINDOWED
    assert ours == pytest.approx(both + (few * ring + WINDOWED * halo) / 2**30, abs=0.011)


def test_states_and_activations() -> None:
    for gpus in (8, 64, 128):
        plain, _, ours, _ = map(gib, cells(str(gpus), "FSDP2"))
        assert plain == ours == pytest.approx(16 * 2.39e9 / gpus / 2**30, rel=0.02)
    (kept,) = cells("`sdpa`, `flash`: base Q, K, V, and P times Q, K, V, O")
    assert kept == f"{83 * BASE / 2**20:.0f} MiB"
