"""What is handed to FlashAttention: layout, windows, positions, documents, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Generator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iha import BACKENDS, interleaved_head_attention
from iha.backends import flash
from iha.checks import checked_call
from tests.arguments import tensors
from tests.backends import flash_packages
from tests.backends.flash_packages import NAMES, pretend

TWO_DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [5, 2, 2, 2, 2, 2, 2]])
RESUMED = torch.tensor([[0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])


def compare(arguments: dict[str, Any]) -> None:
    expected = interleaved_head_attention(**arguments, backend="reference")
    output = interleaved_head_attention(**arguments, backend="flash")
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("package", NAMES)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({"G": 2}, {"window": 3}),
        ({"G": 1, "S": 11}, {"window": 4, "softcap": 2.0, "scale": 0.5}),
        ({"S": 11}, {"query_offset": 2}),
        ({"S": 11}, {"query_offset": 2, "window": 3}),
        ({"S": 11, "N": 1}, {"window": 2}),
        ({"P": 1, "S": 11}, {"causal": "token", "window": 3}),
        ({"S": 5}, {"causal": None}),
        ({"S": 11}, {"causal": None, "query_offset": 1}),
        ({"P": 1, "S": 11}, {"causal": None, "window": 3}),
        ({"G": 2}, {"document_ids": TWO_DOCUMENTS}),
        ({}, {"document_ids": TWO_DOCUMENTS, "window": 2, "softcap": 3.0}),
        ({}, {"document_ids": TWO_DOCUMENTS, "causal": None}),
        ({"P": 3, "Pq": 2}, {"document_ids": TWO_DOCUMENTS, "causal": None}),
        ({"P": 3, "Pq": 2, "S": 11}, {"causal": None, "softcap": 2.0}),
    ],
    ids=str,
)
def test_it_is_the_reference(
    monkeypatch: pytest.MonkeyPatch, package: str, sizes: dict[str, Any], options: dict[str, Any]
) -> None:
    pretend(monkeypatch, package)
    compare({**tensors(d=8, **sizes), **options})


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_what_it_does_not_refuse_it_does_right(
    monkeypatch: pytest.MonkeyPatch, pytorch_s_own: list[tuple[int, int]], data: st.DataObject
) -> None:
    pretend(monkeypatch, data.draw(st.sampled_from(NAMES)))
    N, G, P = (data.draw(st.integers(1, high)) for high in (6, 2, 3))
    S, Pq = N + data.draw(st.integers(0, 3)), data.draw(st.integers(1, P))
    arguments: dict[str, Any] = tensors(N=N, S=S, G=G, P=P, Pq=Pq, H=2 * G, d=8)
    arguments["causal"] = data.draw(st.sampled_from(["flat", "token", None]))
    arguments["window"] = data.draw(st.none() | st.integers(1, S))
    offset = data.draw(st.integers(0, S - N))
    arguments["query_offset"] = data.draw(st.sampled_from([None, offset, torch.tensor(offset)]))
    if data.draw(st.booleans()):
        ids = st.lists(st.integers(0, 2), min_size=S, max_size=S)
        arguments["document_ids"] = torch.tensor([data.draw(ids), data.draw(ids.map(sorted))])
    if flash.refusal(checked_call(**arguments)) is None:
        compare(arguments)


@pytest.fixture
def pytorch_s_own() -> Generator[list[tuple[int, int]]]:
    """The windows that PyTorch's own FlashAttention is called with."""
    seen: list[tuple[int, int]] = []
    with flash_packages.pytorch_s_own(seen):
        yield seen


@pytest.mark.parametrize("Pq", [1, 2, 3])
@pytest.mark.parametrize("G", [4, 2])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({}, {"window": 3}),
        ({"S": 11}, {"window": 1, "scale": 0.3}),
        ({"S": 11}, {"query_offset": 2}),
        ({"S": 11}, {"query_offset": 2, "window": 4}),
        ({}, {"document_ids": TWO_DOCUMENTS}),
        ({}, {"document_ids": TWO_DOCUMENTS, "window": 2}),
    ],
    ids=str,
)
def test_fewer_pseudo_queries_are_parts_merged(
    monkeypatch: pytest.MonkeyPatch,
    pytorch_s_own: list[tuple[int, int]],
    Pq: int,
    G: int,
    sizes: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Outputs and gradients, and that no package is needed."""
    pretend(monkeypatch)
    turn = torch.rand(4, 2, generator=torch.Generator().manual_seed(1))
    options = {**options, "phase": (turn.cos(), turn.sin())}
    given = tensors(d=8, P=4, Pq=Pq, G=G, **sizes)
    torch.testing.assert_close(*(differentiated(given, options, b) for b in ("flash", "reference")))
    W = options.get("window")
    expected = {(-1, 0)} if W is None else {(W - 1, 0), (W * Pq - 1, 0)}
    assert set(pytorch_s_own) == expected
    assert len(pytorch_s_own) == 1 + (4 - Pq) * Pq


@pytest.mark.parametrize("options", [{}, {"window": 3}], ids=str)
def test_parts_fit_the_operators_for_gpus(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Their own schemas and shapes, forward and backward, without numbers."""
    pretend(monkeypatch)
    given = {
        name: t.to("meta", torch.bfloat16).requires_grad_()
        for name, t in tensors(d=16, P=4, Pq=2, G=2).items()
    }
    output = interleaved_head_attention(**given, **options, backend="flash")
    assert output.shape == given["query"].shape
    found = torch.autograd.grad(output.sum(), list(given.values()))
    assert [t.shape for t in found] == [t.shape for t in given.values()]


@pytest.mark.parametrize(("package", "unlimited"), list(zip(NAMES, (None, -1, -1), strict=True)))
def test_windows_as_the_package_says_them(
    monkeypatch: pytest.MonkeyPatch, package: str, unlimited: int | None
) -> None:
    seen = pretend(monkeypatch, package)[package]
    given = tensors(d=8, P=3)
    interleaved_head_attention(**given, backend="flash")
    interleaved_head_attention(**given, window=2, backend="flash")
    given = tensors(d=8, P=1)
    interleaved_head_attention(**given, causal=None, window=2, backend="flash")
    # Two tokens are six virtual tokens, with the query's own: five to the left.
    windows = [(unlimited, unlimited), (5, 0), (1, 1)]
    assert [call["window_size"] for call in seen] == windows
    assert [call["causal"] for call in seen] == [True, True, False]


@pytest.mark.parametrize("options", [{"window": 3}, {"document_ids": TWO_DOCUMENTS}], ids=str)
def test_gradients_pass_through(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    pretend(monkeypatch, NAMES[0])
    found = (differentiated(tensors(d=8, G=2), options, b) for b in ("flash", "reference"))
    torch.testing.assert_close(*found)


def differentiated(
    given: dict[str, torch.Tensor], options: dict[str, Any], backend: str
) -> list[torch.Tensor]:
    """The output, and gradients."""
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    output = interleaved_head_attention(**leaves, **options, backend=backend)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), list(leaves.values()))]


def test_streamed_by_key_value_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, NAMES[1])
    given = tensors(d=8, G=2)
    output = interleaved_head_attention(**given, window=3, backend="streamed:flash")
    expected = interleaved_head_attention(**given, window=3, backend="reference")
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-10)


def chosen(monkeypatch: pytest.MonkeyPatch, *installed: str, d: int = 8, **options: Any) -> str:
    """The package that a call is handed to."""
    seen = pretend(monkeypatch, *installed, major=options.pop("major", 9))
    interleaved_head_attention(**tensors(d=d), **options, backend="flash")
    (name,) = (name for name, calls in seen.items() if calls)
    return name


def test_the_newest_package_that_can_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    cute, interface, plain = NAMES
    assert chosen(monkeypatch, *NAMES) == cute
    assert chosen(monkeypatch, interface, plain) == interface
    assert chosen(monkeypatch, *NAMES, d=192) == interface
    assert chosen(monkeypatch, *NAMES, major=8) == plain
    assert chosen(monkeypatch, *NAMES, major=10) == cute
    assert chosen(monkeypatch, interface, plain, major=10) == plain
    assert chosen(monkeypatch, *NAMES, dropout_p=0.5) == plain


def test_dropout_reaches_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = pretend(monkeypatch, *NAMES)[NAMES[2]]
    interleaved_head_attention(**tensors(d=8), dropout_p=0.25, backend="flash")
    assert [call["dropout_p"] for call in seen] == [0.25]


def test_a_package_without_its_functions_is_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 4 alone leaves `flash_attn` importable, as a parent with nothing in it."""
    pretend(monkeypatch, NAMES[0])
    monkeypatch.setitem(sys.modules, NAMES[2], ModuleType(NAMES[2]))
    assert flash.imported(NAMES[0]) is not None
    assert flash.imported(NAMES[2]) is None


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("takes no attn_mask", {}, {"attn_mask": torch.ones(1, 1, 7, 7, dtype=torch.bool)}),
    ("token causality sees its own token's later pseudo-keys", {}, {"causal": "token"}),
    ("a window to both sides", {}, {"causal": None, "window": 3}),
    ("a window to both sides", {"P": 1, "S": 9}, {"causal": None, "window": 3, "query_offset": 1}),
    ("must know query_offset as an int", {"S": 9}, {"query_offset": torch.tensor(1)}),
    ("packed documents", {"N": 3}, {"document_ids": TWO_DOCUMENTS}),
    ("no contiguous run", {}, {"document_ids": RESUMED}),
    ("multiple of 8, not 4", {"d": 4}, {}),
    ("so not by -1", {}, {"scale": -1.0}),
    ("the head dimension 264 is more than", {"d": 264}, {}),
    ("fewer pseudo-queries than .* no dropout", {"Pq": 1}, {"dropout_p": 0.1}),
    ("fewer pseudo-queries than .* no soft-cap", {"Pq": 2}, {"softcap": 1.0}),
    ("dropout and a soft-cap is more than", {}, {"dropout_p": 0.1, "softcap": 1.0}),
]


@pytest.mark.parametrize(("sentence", "sizes", "options"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refusals(
    monkeypatch: pytest.MonkeyPatch, sentence: str, sizes: dict[str, Any], options: dict[str, Any]
) -> None:
    pretend(monkeypatch, *NAMES)
    sizes = {"S": 7, **sizes} if "N" in sizes else sizes
    given = {**tensors(**{"d": 16, **sizes}, dtype=torch.float32), **options}
    with pytest.raises(ValueError, match=sentence) as caught:
        interleaved_head_attention(**given, backend="flash")
    able = str(caught.value).rsplit("'", 2)[1]
    assert BACKENDS[able].refusal(checked_call(**given)) is None


def test_refusals_of_device_dtype_and_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors()
    with pytest.raises(ValueError, match="CUDA device, not cpu; 'sdpa' can do it"):
        interleaved_head_attention(**given, backend="flash")
    pretend(monkeypatch)
    with pytest.raises(ValueError, match=r"none of the packages .* can be imported; install one"):
        interleaved_head_attention(**tensors(d=8), backend="flash")


def test_a_graph_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, *NAMES)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    why = flash.refusal(checked_call(**tensors(d=8)))
    assert why is not None
    assert "would break the graph" in why()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 5.0}], ids=str)
def test_the_real_package(options: dict[str, Any]) -> None:
    given = tensors(N=70, G=2, d=64, dtype=torch.bfloat16)
    given = {name: tensor.cuda().requires_grad_() for name, tensor in given.items()}
    call = checked_call(**given, **options)
    if (why := flash.refusal(call)) is not None:
        pytest.skip(why())
    output = interleaved_head_attention(**given, **options, backend="flash")
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    expected = interleaved_head_attention(**exact, **options, backend="reference")
    torch.testing.assert_close(output.double(), expected, atol=0.05, rtol=0.05)
    for result in (output, expected):
        result.sum().backward()
    got = given["alpha_q"].grad
    assert got is not None
    torch.testing.assert_close(got.double(), exact["alpha_q"].grad, atol=0.5, rtol=0.1)
