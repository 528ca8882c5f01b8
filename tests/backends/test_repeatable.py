"""Equal inputs give equal bits, whatever the memory held that results are written into."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import pytest
import torch

from iha import interleaved_head_attention
from tests.arguments import NAMES, tensors


@contextlib.contextmanager
def poisoned() -> Generator[None]:
    """PyTorch fills what it allocates uninitialised with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def results(given: dict[str, Any], backend: str, options: dict[str, Any]) -> list[torch.Tensor]:
    """Output without gradients, with them, and the gradients."""
    with torch.no_grad():
        alone = interleaved_head_attention(**given, **options, backend=backend)
    leaves = {name: given[name].clone().requires_grad_() for name in NAMES}
    output = interleaved_head_attention(**leaves, **options, backend=backend)
    gradients = torch.autograd.grad(output.square().sum(), list(leaves.values()))
    return [alone, output.detach(), *gradients]


@pytest.mark.parametrize(
    ("backend", "sizes", "options"),
    [
        ("reference", {}, {"window": 9}),
        ("sdpa", {}, {}),
        ("sdpa", {"S": 70}, {"window": 9}),
        ("sdpa", {"N": 520, "Pq": 1}, {}),
        ("local", {"N": 3000, "d": 32}, {"window": 40}),  # several chunks
        ("chunked", {"N": 130, "S": 700}, {}),
        ("chunked", {"N": 1, "S": 9000}, {}),
        ("streamed", {}, {}),
        ("fused", {"N": 9, "Pq": 2}, {"window": 4}),
    ],
    ids=str,
)
def test_equal_bits(backend: str, sizes: dict[str, Any], options: dict[str, Any]) -> None:
    given = tensors(**{"N": 60, "G": 2, "d": 8, "dtype": torch.float32, **sizes})
    angle = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    options = {**options, "phase": (angle.cos(), angle.sin())}
    first, second = (results(given, backend, options) for _ in range(2))
    with poisoned():
        third = results(given, backend, options)
    for one, other, after in zip(first, second, third, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)
        assert torch.equal(one, after)
