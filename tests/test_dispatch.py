"""Which backend runs, what the others say, and that whom they name is able."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from iha import BACKENDS, explain_backend, interleaved_head_attention
from iha.backends import chunked, fused, sdpa
from iha.checks import checked_call
from tests.arguments import arguments, tensors
from tests.backends import flash_packages


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, "sdpa"),
        ({"window": 3}, "local"),
        ({"window": 7}, "sdpa"),  # as long as the sequence: no window
        ({"window": 3, "softcap": 1.0}, "local"),
        ({"softcap": 1.0}, "chunked"),
        ({"causal": "token"}, "sdpa"),
    ],
    ids=str,
)
def test_what_runs_on_a_cpu(options: dict[str, Any], chosen: str) -> None:
    choice = explain_backend(**tensors(), **options)
    assert choice.chosen == chosen
    assert set(choice.why_not) == {*BACKENDS, "streamed"} - {chosen}
    assert all(choice.why_not.values())
    lines = str(choice).splitlines()
    assert lines[0] == f"{chosen} runs"
    assert len(lines) == 1 + len(choice.why_not)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"Pq": 1}, {}),
        ({}, {"causal": "token"}),
        ({}, {"document_ids": torch.zeros(2, 300).long()}),
    ],
    ids=str,
)
def test_a_long_call_on_a_cpu_writes_no_mask_of_all_pairs(
    sizes: dict[str, Any], options: dict[str, Any]
) -> None:
    given = tensors(N=300, P=2, **sizes)
    assert explain_backend(**given, **options).chosen == "chunked"
    given["key"].requires_grad_()  # autograd would keep the scores of each chunk
    assert explain_backend(**given, **options).chosen == "sdpa"
    with torch.no_grad():
        assert explain_backend(**given, **options).chosen == "chunked"


@pytest.mark.parametrize(
    ("sizes", "options"),
    [({"Pq": 1}, {}), ({"Pq": 2}, {"causal": "token"}), ({"S": 9000}, {}), ({}, {})],
    ids=str,
)
def test_causality_alone_takes_no_mask_of_a_long_call_with_gradients(
    sizes: dict[str, Any], options: dict[str, Any]
) -> None:
    given = tensors(B=1, H=2, N=5000, P=3, dtype=torch.float32, **sizes)
    given["key"].requires_grad_()
    assert explain_backend(**given, **options).chosen == "sdpa"
    assert not sdpa.needs_dense_mask(checked_call(**given, **options))


def test_explanations_say_what_was_asked() -> None:
    named = explain_backend(**tensors(), backend="reference")
    assert named.chosen == "reference"
    assert named.why_not["sdpa"] == "it can, but reference was named"
    preferred = explain_backend(**tensors(), window=3)
    assert preferred.why_not["sdpa"] == "it can, but local is preferred here"
    assert "only runs when it is named" in preferred.why_not["streamed"]


def test_streamed_around_what_is_best_or_named() -> None:
    assert explain_backend(**tensors(), backend="streamed").chosen == "streamed:sdpa"
    assert explain_backend(**tensors(), window=3, backend="streamed").chosen == "streamed:local"
    choice = explain_backend(**tensors(), backend="streamed:reference")
    assert choice.chosen == "streamed:reference"
    assert "streamed" not in choice.why_not


def test_an_unknown_name_lists_the_known() -> None:
    for name in ("flas", "streamed:flas"):
        with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'reference', .*flas"):
            interleaved_head_attention(**tensors(), backend=name)


def test_a_named_backend_that_cannot_says_why() -> None:
    for name in ("sdpa", "streamed:sdpa"):
        with pytest.raises(
            ValueError, match=r"backend 'sdpa' cannot run this call: .* no soft-cap"
        ):
            interleaved_head_attention(**tensors(), softcap=1.0, backend=name)


@settings(max_examples=100, deadline=None)
@given(arguments(softcap=True))
def test_whom_a_refusal_names_is_able(arguments: dict[str, Any]) -> None:
    call = checked_call(**arguments)
    for name, backend in BACKENDS.items():
        why = backend.refusal(call)
        if why is not None:
            (able,) = re.findall(r"'(\w+)'", why())
            assert BACKENDS[able].refusal(call) is None, f"{name}: {why()}"


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 1.0}, {"causal": "token"}])
def test_a_few_queries_after_a_cache_are_not_mixed_with_all_of_it(options: dict[str, Any]) -> None:
    for N in (1, 4, chunked.FEW):
        assert explain_backend(**tensors(N=N, S=40), **options).chosen == "chunked"
    assert explain_backend(**tensors(N=chunked.FEW + 1, S=40), **options).chosen != "reference"


def chosen_on_cuda(options: dict[str, Any], **sizes: Any) -> str:
    """Fake tensors say that they are on a GPU; nothing is computed."""
    sizes = {"N": 70, "d": 64, "dtype": torch.bfloat16, **sizes}
    real = {**tensors(**sizes), **options}
    fake: dict[str, Any] = {}
    with FakeTensorMode():
        for name, value in real.items():
            if isinstance(value, torch.Tensor):
                value = torch.empty(value.shape, dtype=value.dtype, device="cuda")
            fake[name] = value
        return explain_backend(**fake).chosen


@pytest.mark.parametrize(
    ("sizes", "options", "without", "with_flash"),
    [
        ({}, {}, "sdpa", "flash"),
        ({"P": 1}, {"causal": "token"}, "sdpa", "flash"),
        ({}, {"causal": None}, "sdpa", "flash"),
        ({}, {"causal": "token"}, "flex", "flex"),
        ({"S": 90}, {}, "flex", "flash"),  # queries that start later need a mask in SDPA
        ({"S": 90}, {"query_offset": torch.tensor(3)}, "flex", "flex"),
        ({}, {"dropout_p": 0.1, "causal": "token"}, "sdpa", "sdpa"),
        ({"dtype": torch.float64}, {"causal": "token"}, "sdpa", "sdpa"),
        ({}, {"softcap": 1.0}, "flex", "flash"),
        ({}, {"window": 9}, "flex", "flash"),
        ({}, {"window": 9, "causal": "token"}, "flex", "flex"),
        ({"dtype": torch.float64}, {"window": 9}, "local", "local"),
        ({"dtype": torch.float64}, {"softcap": 1.0}, "chunked", "chunked"),
        ({"Pq": 1}, {}, "flash", "flash"),  # PyTorch's own, so no package is needed
        ({"Pq": 2}, {"window": 9}, "flash", "flash"),
        ({"Pq": 2, "S": 90}, {}, "flash", "flash"),
        ({"Pq": 1}, {"softcap": 1.0}, "flex", "flex"),
        ({"Pq": 1}, {"causal": "token"}, "flex", "flex"),
        ({"Pq": 1}, {"causal": None}, "sdpa", "flash"),
        ({"Pq": 1, "dtype": torch.float32}, {}, "flex", "flex"),
        ({"N": 1, "S": 70}, {}, "chunked", "chunked"),  # a step of decoding compiles nothing
        ({"N": 1, "S": 70}, {"query_offset": torch.tensor(9)}, "chunked", "chunked"),
        ({"N": 1, "S": 70}, {"query_offset": torch.tensor(9), "window": 9}, "chunked", "chunked"),
    ],
    ids=str,
)
def test_what_is_preferred_on_cuda(
    monkeypatch: pytest.MonkeyPatch,
    sizes: dict[str, Any],
    options: dict[str, Any],
    without: str,
    with_flash: str,
) -> None:
    monkeypatch.setattr(fused, "unfit_device", lambda call: None)  # it would ask the GPU
    flash_packages.pretend(monkeypatch, on_cuda=True)
    assert chosen_on_cuda(options, **sizes) == without
    flash_packages.pretend(monkeypatch, *flash_packages.NAMES, on_cuda=True)
    assert chosen_on_cuda(options, **sizes) == with_flash


def test_what_auto_never_takes_says_so() -> None:
    why_not = explain_backend(**tensors(dtype=torch.float32), window=3).why_not
    assert "no GPU has run its kernels yet" in why_not["fused"]
    assert "trades time for memory" in why_not["streamed"]
