"""Chunks of `local`: several are really used, and nobody can tell from what comes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from iha import interleaved_head_attention
from iha.backends import local
from iha.call import Call
from tests.arguments import NAMES, arguments, tensors


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every block a chunk; the query tokens of each as they are computed."""
    found: list[int] = []
    attend = local._attend

    def counted(call: Call) -> Tensor:
        found.append(call.query.shape[2])
        return attend(call)

    monkeypatch.setattr(local, "CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr(local, "KEPT_CHUNKS", 1)
    monkeypatch.setattr(local, "_attend", counted)
    monkeypatch.setattr(local, "block_size", lambda call: min(2, call.query.shape[2]))
    return found


def gradients(given: dict[str, Any], backend: str, **options: Any) -> list[Tensor]:
    """The output, and the gradients of a loss that weighs every output differently."""
    leaves = {name: given[name].detach().clone().requires_grad_() for name in NAMES}
    output = interleaved_head_attention(**{**given, **leaves}, **options, backend=backend)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), list(leaves.values()))]


def test_every_argument_in_many_chunks(small: list[int]) -> None:
    chunked = 0

    @settings(max_examples=80)
    @given(arguments(window=True, softcap=True))
    def check(arguments: dict[str, Any]) -> None:
        nonlocal chunked
        assume(arguments["window"] < arguments["key"].shape[2])
        small.clear()
        found = gradients(arguments, "local")
        chunked += len(small) > 2
        for got, wanted in zip(found, gradients(arguments, "reference"), strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)

    check()
    assert chunked > 20


def test_the_backward_pass_computes_each_chunk_again(small: list[int]) -> None:
    given = tensors(B=2, N=7)
    with torch.no_grad():
        interleaved_head_attention(**given, window=2, backend="local")
    assert small == [2, 2, 2, 1] * 2
    small.clear()
    gradients(given, "local", window=2)
    assert small == [2, 2, 2, 1] * 4


def test_a_few_chunks_are_one(small: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "KEPT_CHUNKS", 8)
    given = tensors(B=2, N=7)
    found = gradients(given, "local", window=2)
    assert small == [7]
    for got, wanted in zip(found, gradients(given, "reference", window=2), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)


def test_short_sequences_share_a_chunk(small: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors(B=6, N=4, d=4, P=3)
    one = 3 * 4 * 8 * (4 * 2 + 2 * 4 * (2 + 2))  # bytes of a block: T = 2, W = 2
    monkeypatch.setattr(local, "CHUNK_BYTES", {"cpu": 8 * one})
    found = gradients(given, "local", window=2)
    assert small == [4, 4] * 2
    for got, wanted in zip(found, gradients(given, "reference", window=2), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)


def test_autograd_keeps_the_base_tensors_only() -> None:
    """At a size that is cut up with the constants as they are."""
    leaves = [t.requires_grad_() for t in tensors(H=8, N=400, d=32, P=8).values()]
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        interleaved_head_attention(*leaves, window=16, backend="local")
    assert sum(saved.values()) == sum(leaf.nbytes for leaf in leaves)


def test_the_backward_pass_drops_what_the_forward_pass_dropped(small: list[int]) -> None:
    """The output is linear in the values: finite differences have no error but rounding."""
    given = tensors(B=2, N=8)
    given["value"].requires_grad_()
    weights = torch.linspace(-1, 1, 2 * 4 * 8 * 4, dtype=torch.float64).view(2, 4, 8, 4)

    def loss(value: Tensor) -> Tensor:
        torch.manual_seed(3)
        output = interleaved_head_attention(
            **{**given, "value": value}, window=3, dropout_p=0.5, backend="local"
        )
        return (output * weights).sum()

    forward = loss(given["value"])
    torch.rand(5)  # whatever the generator does in between
    state = torch.get_rng_state()
    (gradient,) = torch.autograd.grad(forward, given["value"])
    assert torch.equal(torch.get_rng_state(), state)
    assert len(small) > 8
    with torch.no_grad():
        step = torch.randn_like(given["value"])
        difference = (loss(given["value"] + step) - loss(given["value"] - step)) / 2
    torch.testing.assert_close(difference, (gradient * step).sum())


def test_a_learned_phase_gets_its_gradient(small: list[int]) -> None:
    angle = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    found = []
    for backend in ("local", "reference"):
        output = interleaved_head_attention(
            **tensors(), window=2, phase=(angle.cos(), angle.sin()), backend=backend
        )
        found += torch.autograd.grad(output.square().sum(), angle)
    torch.testing.assert_close(*found, atol=1e-10, rtol=1e-10)


def test_gradients_that_nobody_asked_for_are_not_given(small: list[int]) -> None:
    given = tensors(N=8)
    given["alpha_k"].requires_grad_()
    interleaved_head_attention(**given, window=2, backend="local").sum().backward()
    assert given["alpha_k"].grad is not None
    assert given["query"].grad is None


def test_a_compiler_gets_one_chunk(small: list[int]) -> None:
    given = tensors(N=8)
    torch.compiler.reset()  # other tests compile it too, and after eight ways it gives up
    compiled = torch.compile(interleaved_head_attention, fullgraph=True, backend="eager")
    found = compiled(**given, window=2, backend="local")
    expected = interleaved_head_attention(**given, window=2, backend="reference")
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_half_precision_gradients_are_summed_in_float32(small: list[int]) -> None:
    given = tensors(N=64, dtype=torch.bfloat16)
    exact = {name: tensor.double() for name, tensor in given.items()}
    found = gradients(given, "local", window=2)
    for got, wanted in zip(found, gradients(exact, "reference", window=2), strict=True):
        assert got.dtype == torch.bfloat16
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < 0.02
