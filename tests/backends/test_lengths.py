"""One graph for sequences of any length, with a window and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from iha import interleaved_head_attention
from tests.arguments import tensors

LIMITS: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0},
    {"window": 5},
    {"window": 5, "causal": "token"},
    {"window": 5, "softcap": 3.0},
]


class Attend(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *given: Tensor) -> Tensor:
        return interleaved_head_attention(*given, **self.options)


def check(function: Any, N: int, **options: Any) -> None:
    given = tensors(N=N, d=8, G=2, dtype=torch.float32)
    expected = interleaved_head_attention(**given, backend="reference", **options)
    torch.testing.assert_close(function(*given.values()), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_two_graphs_are_enough(options: dict[str, Any]) -> None:
    """One for the first length, one for all others, shorter than the window or longer."""
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(Attend(**options), backend=counter, fullgraph=True)
    for N in (7, 12, 3, 20, 33, 5, 70, 140):
        check(compiled, N, **options)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_an_export_is_of_any_length(options: dict[str, Any], strict: bool) -> None:
    torch.compiler.reset()
    example = tensors(N=12, d=8, G=2, dtype=torch.float32)
    length = {2: torch.export.Dim("length", min=2, max=512)}
    shapes = ((*[length] * 3, *[None] * 4),)
    exported = torch.export.export(
        Attend(**options), tuple(example.values()), dynamic_shapes=shapes, strict=strict
    )
    for N in (2, 4, 5, 6, 20, 100):
        check(exported.module(), N, **options)
