"""What the page on serving counts, against figures put together by hand."""

from __future__ import annotations

from iha_lab.report.serving_tables import counted


def rows() -> dict[str, list[str]]:
    """Return the cells of each row of both tables, by what stands first."""
    lines = [line.strip("| ").split(" | ") for line in counted().splitlines() if "|" in line]
    return {name: cells for name, *cells in lines}


def test_a_long_prompt() -> None:
    """Llama 3.1 8B: 2·32·8·128 numbers of two bytes a token; 4·32·4096·N²/2 FLOPs."""
    cache, flops, part = rows()["plain"]
    assert cache == f"{2 * 32 * 8 * 128 * 2 * 131072 / 2**30:.0f} GiB"
    assert flops == f"{32 * 4 * 4096 * 131072**2 / 2:.2e}"
    assert float(part) == 1
    cache, _, part = rows()["IHA, P = 2, every layer global"]
    assert (cache, float(part)) == ("16 GiB", 4.0)  # P², and the mixing is lost beside it


def test_traffic_of_tensor_parallelism() -> None:
    """7/8 of H + 2G + H heads, or of P(H + 2G) + H, 128 numbers of two bytes each."""
    found = [cells for name, cells in rows().items() if "reduce-scatter" in name]
    wanted = [f"{7 / 8 * heads * 128 * 2 / 1024:.1f} KiB" for heads in (80, 128)]
    assert [traffic for traffic, _ in found] == wanted
    assert [cache for _, cache in found] == ["16 GiB", "4 GiB"]
