"""`sdpa` in parts: fewer pseudo-queries, token causality and queries behind a cache, no mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import iha
from iha.backends import sdpa
from iha.checks import checked_call
from tests.arguments import tensors


@pytest.fixture(autouse=True)
def _short_calls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "LONG", 1)


@pytest.fixture
def _no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def virtual_mask(call: Any) -> None:
        raise AssertionError("a mask of all pairs is written")

    monkeypatch.setattr(sdpa, "virtual_mask", virtual_mask)


def differentiated(arguments: dict[str, Any], backend: str) -> list[torch.Tensor]:
    leaves = {
        n: t.clone().requires_grad_() if torch.is_tensor(t) else t for n, t in arguments.items()
    }
    output = iha.interleaved_head_attention(**leaves, backend=backend)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    tensors = [t for t in leaves.values() if torch.is_tensor(t)]
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), tensors)]


@pytest.mark.usefixtures("_no_mask")
@settings(max_examples=60)
@given(data=st.data())
def test_outputs_and_gradients(data: st.DataObject) -> None:
    G, groups, P, N = (data.draw(st.integers(1, most)) for most in (2, 2, 4, 7))
    Pq, S = data.draw(st.integers(1, P)), N + data.draw(st.integers(0, 4))
    arguments: dict[str, Any] = tensors(H=G * groups, G=G, N=N, S=S, P=P, Pq=Pq)
    arguments["causal"] = data.draw(st.sampled_from(["flat", "token"]))
    arguments["query_offset"] = data.draw(st.integers(0, S - N))
    if data.draw(st.booleans()):
        angle = torch.rand(P, 1, generator=torch.Generator().manual_seed(0))
        arguments["phase"] = (angle.cos(), angle.sin())
    found, expected = (differentiated(arguments, name) for name in ("sdpa", "reference"))
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


@pytest.mark.usefixtures("_no_mask")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    """A part's output and gradient are rounded once each; their sums are not."""
    given = tensors(N=9, S=12, G=2, P=4, Pq=2, dtype=dtype)
    exact = {name: t.double() for name, t in given.items()}
    expected = differentiated(exact, "reference")
    for got, wanted in zip(differentiated(given, "sdpa"), expected, strict=True):
        assert got.dtype == dtype
        tolerance = 30 * torch.finfo(dtype).eps * max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=0.0)


def test_scores_of_any_size() -> None:
    """Sums of exponentials that no float holds."""
    given = tensors(N=6, P=3, Pq=1, dtype=torch.float32)
    exact = {name: t.double() for name, t in given.items()}
    for scale in (1e-6, 400.0):
        found = iha.interleaved_head_attention(**given, scale=scale, backend="sdpa")
        expected = iha.interleaved_head_attention(**exact, scale=scale, backend="reference")
        torch.testing.assert_close(found.double(), expected, atol=3e-3, rtol=0.0)


@pytest.mark.parametrize(
    "options",
    [{"dropout_p": 0.1}, {"scale": -1.0}, {"attn_mask": torch.ones(7, 7, dtype=torch.bool)}],
    ids=str,
)
def test_what_no_part_can_say_still_takes_a_mask(options: dict[str, Any]) -> None:
    given = tensors(Pq=1)
    assert not sdpa.needs_dense_mask(checked_call(**given))
    assert sdpa.needs_dense_mask(checked_call(**given, **options))


# PyTorch's own, from its compiler.
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
def test_whole_graph_compiles() -> None:
    given = {n: t.requires_grad_() for n, t in tensors(N=12, Pq=1, dtype=torch.float32).items()}
    torch.compiler.reset()
    compiled = torch.compile(iha.interleaved_head_attention, fullgraph=True)
    outputs = (compiled(**given, backend="sdpa"), iha.interleaved_head_attention(**given))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    found = (torch.autograd.grad(o.sum(), list(given.values())) for o in outputs)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
