"""Streaming: the same function and gradients, for the memory of the base tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from iha import explain_backend, interleaved_head_attention
from tests.arguments import NAMES, tensors

INNER = ["sdpa", "local", "reference"]


def gradients(given: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The output, and the gradients of a loss that weighs every output differently."""
    leaves = [given[name].detach().clone().requires_grad_() for name in NAMES]
    output = interleaved_head_attention(*leaves, **options)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("G", [4, 2, 1])
@pytest.mark.parametrize("mask_heads", [None, 1, 4])
def test_it_is_what_runs_inside(inner: str, per_head: bool, G: int, mask_heads: int | None) -> None:
    given = tensors(G=G, N=8, S=10, per_head=per_head)
    options: dict[str, Any] = {"window": 4}
    if mask_heads is not None:
        random = torch.Generator().manual_seed(0)
        options["attn_mask"] = torch.rand(2, mask_heads, 8, 10, generator=random) < 0.7
    expected = gradients(given, **options, backend=inner)
    assert_same(gradients(given, **options, backend=f"streamed:{inner}"), expected)


@pytest.mark.parametrize("G", [4, 2])
def test_every_head_has_its_own_mask(G: int) -> None:
    given = tensors(G=G, per_head=True)
    mask = torch.ones(1, 4, 7, 7, dtype=torch.bool)
    options = {"causal": None, "backend": "streamed:sdpa"}
    before = interleaved_head_attention(**given, **options, attn_mask=mask)
    mask[:, 2, :, 3:] = False
    after = interleaved_head_attention(**given, **options, attn_mask=mask)
    changed = (after != before).any(-1).any(-1).any(0)
    assert changed.tolist() == [False, False, True, False]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("per_head", [False, True])
def test_the_backward_pass_drops_what_the_forward_pass_dropped(inner: str, per_head: bool) -> None:
    """Finite differences of the loss with the seed set anew, against the recomputed gradient."""
    given = tensors(B=1, H=4, G=2, N=6, P=2, per_head=per_head)
    given["value"].requires_grad_()
    options = {"window": 4, "dropout_p": 0.5, "backend": f"streamed:{inner}"}

    def loss(value: Tensor) -> Tensor:
        torch.manual_seed(3)
        output = interleaved_head_attention(**{**given, "value": value}, **options)
        torch.rand(5)  # whatever the generator does in between
        return (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()

    forward = loss(given["value"])
    state = torch.get_rng_state()
    (gradient,) = torch.autograd.grad(forward, given["value"])
    assert torch.equal(torch.get_rng_state(), state)  # as it was
    with torch.no_grad():
        for _ in range(3):
            step = torch.randn_like(given["value"])
            ahead, behind = loss(given["value"] + step), loss(given["value"] - step)
            # The output is linear in the values, so there is no error but rounding.
            torch.testing.assert_close((ahead - behind) / 2, (gradient * step).sum())


def test_gradients_without_dropout_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    gradients(tensors(), backend="streamed:sdpa")
    assert torch.equal(torch.get_rng_state(), before)


class Storages(TorchDispatchMode):
    """Bytes of the storages that operations have made and something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        known = {
            StorageWeakRef(t.untyped_storage()).cdata
            for t in tree_iter((arguments, keywords))
            if isinstance(t, Tensor)
        }
        made = function(*arguments, **(keywords or {}))
        self.alive()  # forgets the dead, whose addresses may be used again
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in known:
                    self.made[reference.cdata] = (reference, storage.nbytes())
        self.peak = max(self.peak, self.alive())
        return made

    def alive(self) -> int:
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        return sum(size for _, size in self.made.values())


def measured(
    given: dict[str, Tensor], run: Callable[..., Tensor], **options: Any
) -> tuple[float, float, float]:
    """Saved for backward, alive after forward, and the peak, each in bytes of query, key, value."""
    leaves = [given[name].clone().requires_grad_() for name in NAMES]
    base = sum(leaf.nbytes for leaf in leaves[:3])
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    storages = Storages()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), storages:
        output = run(*leaves, **options)
        alive = storages.alive() - output.nbytes
        output.sum().backward()
    return sum(saved.values()) / base, alive / base, storages.peak / base


@pytest.mark.parametrize("window", [None, 32])
def test_it_keeps_the_base_tensors_and_works_on_one_chunk_at_a_time(window: int | None) -> None:
    P = 6
    given = tensors(B=1, H=8, N=128, d=32, P=P, dtype=torch.float32)
    inner = "sdpa" if window is None else "local"
    run, options = interleaved_head_attention, {"window": window}
    saved, alive, peak = measured(given, run, **options, backend=f"streamed:{inner}")
    assert saved < 1.5  # query, key and value themselves, and the small mixing tensors
    assert alive < 0.5  # nothing of the forward pass but the output
    plain_saved, plain_alive, plain_peak = measured(given, run, **options, backend=inner)
    assert plain_saved > P
    assert plain_alive > P
    assert peak < plain_peak / 2


def test_without_gradients_nothing_is_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("checkpointed")

    monkeypatch.setattr("iha.backends.streamed.checkpoint", refuse)
    given = tensors()
    output = interleaved_head_attention(**given, backend="streamed:sdpa")
    given["alpha_k"].requires_grad_()
    with torch.no_grad():
        again = interleaved_head_attention(**given, backend="streamed:sdpa")
    assert torch.equal(output, again)
    with pytest.raises(AssertionError, match="checkpointed"):
        interleaved_head_attention(**given, backend="streamed:sdpa")


def test_it_chooses_what_runs_inside_and_says_so() -> None:
    given = tensors()
    for window, inner in ((None, "sdpa"), (3, "local")):
        assert explain_backend(**given, window=window, backend="streamed").chosen == (
            f"streamed:{inner}"
        )
        expected = gradients(given, window=window, backend=f"streamed:{inner}")
        assert_same(gradients(given, window=window, backend="streamed"), expected)
    assert "only runs when it is named" in explain_backend(**given).why_not["streamed"]


def test_streaming_what_streams_changes_nothing() -> None:
    """A chunk is a call like any other, so it can be streamed again: one chunk of one chunk."""
    given = tensors(G=2)
    nested = "streamed:streamed:sdpa"
    assert explain_backend(**given, backend=nested).chosen == nested
    assert_same(gradients(given, backend=nested), gradients(given, backend="sdpa"))


def test_second_derivatives() -> None:
    given = tensors(B=1, H=2, G=1, N=3, d=2, P=2)
    leaves = [given[name].requires_grad_() for name in NAMES]

    def run(*leaves: Tensor) -> Tensor:
        return interleaved_head_attention(*leaves, backend="streamed:reference")

    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("per_head", [False, True])
def test_it_compiles_to_one_graph(per_head: bool) -> None:
    given = tensors(G=2, per_head=per_head)
    expected = gradients(given, backend="sdpa")
    torch.compiler.reset()  # other tests compile it too, and after eight ways it gives up
    compiled = torch.compile(interleaved_head_attention, fullgraph=True, backend="aot_eager")
    leaves = [given[name].requires_grad_() for name in NAMES]
    output = compiled(*leaves, backend="streamed:sdpa")
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    found = [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]
    assert_same(found, expected)
