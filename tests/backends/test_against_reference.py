"""Every backend computes what the reference computes: outputs, gradients, in every precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from iha import interleaved_head_attention
from tests.arguments import NAMES, arguments, tensors

BACKENDS = ["sdpa", "local", "chunked", "streamed:sdpa", "streamed:local"]


def run(arguments: dict[str, Any], backend: str) -> torch.Tensor:
    """`backend`, or nothing where it rightly says that this call is not for it."""
    if "local" in backend:
        assume(arguments.get("window", 10**9) < arguments["key"].shape[2])
    return interleaved_head_attention(**arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_in_float64(backend: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(arguments(window=True if "local" in backend else None, softcap="sdpa" not in backend))
    def check(arguments: dict[str, Any]) -> None:
        expected = interleaved_head_attention(**arguments, backend="reference")
        torch.testing.assert_close(run(arguments, backend), expected, atol=1e-10, rtol=1e-10)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_in_float64(backend: str) -> None:
    @settings(max_examples=30, deadline=None)
    @given(arguments(window=True if "local" in backend else None, softcap="sdpa" not in backend))
    def check(arguments: dict[str, Any]) -> None:
        found: dict[str, list[torch.Tensor]] = {}
        for name in (backend, "reference"):
            leaves = {n: arguments[n].clone().requires_grad_() for n in NAMES}
            output = run({**arguments, **leaves}, name)
            weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
            (output * weight).sum().backward()
            found[name] = [leaves[n].grad for n in NAMES]  # type: ignore[misc]
        for got, expected in zip(found[backend], found["reference"], strict=True):
            torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_in_low_precision(backend: str, dtype: torch.dtype) -> None:
    """Against the reference in float64 on the same rounded inputs.

    A pseudo tensor rounded to `dtype` has the relative error eps; it passes through a score of size
    about |q||k|, a softmax and two more roundings, so a small multiple of eps is what is allowed.
    """

    @settings(max_examples=20, deadline=None)
    @given(arguments(dtype=dtype, window=True if "local" in backend else None))
    def check(arguments: dict[str, Any]) -> None:
        exact = {
            name: value.double() if name in NAMES else value for name, value in arguments.items()
        }
        expected = interleaved_head_attention(**exact, backend="reference")
        output = run(arguments, backend)
        assert output.dtype == dtype
        tolerance = 60 * torch.finfo(dtype).eps
        torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)

    check()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("causal", ["flat", "token", None])
def test_gradcheck(backend: str, causal: Any) -> None:
    given = tensors(B=1, H=2, G=1, N=4, d=2, P=2)
    leaves = [given[name].requires_grad_() for name in NAMES]

    def run(*leaves: torch.Tensor) -> torch.Tensor:
        return interleaved_head_attention(*leaves, causal=causal, window=2, backend=backend)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_causality_by_influence(backend: str, data: st.DataObject) -> None:
    """Changing token t changes no output before t, in another document, or beyond the window."""
    causal = data.draw(st.sampled_from(["flat", "token"]))
    window = data.draw(st.integers(1, 5)) if "local" in backend else data.draw(
        st.one_of(st.none(), st.integers(1, 5))
    )  # fmt: skip
    t = data.draw(st.integers(0, 7))
    given = tensors(B=1, H=4, G=2, N=8, P=3, seed=data.draw(st.integers(0, 99)))
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]]) if data.draw(st.booleans()) else None
    options = {"causal": causal, "window": window, "document_ids": ids, "backend": backend}
    before = interleaved_head_attention(**given, **options)
    for name in ("query", "key", "value"):
        given[name] = given[name].clone()
        given[name][:, :, t] += 1.0
    changed = (interleaved_head_attention(**given, **options) != before).any(-1).any(1)[0]
    # Under flat causality the window's far edge reaches part of one token more.
    reach = 8 if window is None else window + (causal == "flat")
    for n in range(8):
        same_document = ids is None or bool(ids[0, n] == ids[0, t])
        if not (t <= n < t + reach and same_document):
            assert not changed[n], f"token {t} reached output {n}"
    assert changed[t]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("causal", ["flat", "token"])
@pytest.mark.parametrize("window", [None, 3])
def test_decoding_token_by_token_equals_the_full_pass(
    backend: str, causal: Any, window: int | None
) -> None:
    if "local" in backend and window is None:
        window = 4
    given = tensors(N=9, G=2)
    options = {"causal": causal, "window": window}
    full = interleaved_head_attention(**given, **options, backend="reference")
    for n in range(9):
        step = {**given, "query": given["query"][:, :, n : n + 1]}
        for filled in (n + 1, 9):  # a cache that grows, and one that is allocated before
            for name in ("key", "value"):
                step[name] = given[name][:, :, :filled]
            if "local" in backend and window is not None and window >= filled:
                continue
            for offset in (n, torch.tensor(n)):
                output = interleaved_head_attention(
                    **step, **options, query_offset=offset, backend=backend
                )
                torch.testing.assert_close(output, full[:, :, n : n + 1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients(backend: str) -> None:
    given = tensors(N=6)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[:, :, 2] = False
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    output = interleaved_head_attention(**leaves, attn_mask=mask, window=4, backend=backend)
    assert (output[:, :, 2] == 0).all()
    assert (output[:, :, 3] != 0).all()
    output.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves.values())


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_dropout_drops_and_keeps_the_mean(backend: str) -> None:
    """With values all one, an output is the sum of kept weights: its mean over draws stays."""
    torch.manual_seed(0)
    given = tensors(B=64, N=16, H=2, P=2, dtype=torch.float32)
    given["value"] = torch.ones_like(given["value"])
    given["alpha_v"] = torch.eye(2)[:, :, None].repeat(1, 1, 2)
    given["collapse"] = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    options = {"window": 12, "backend": backend}
    kept = interleaved_head_attention(**given, **options, dropout_p=0.4)
    assert torch.allclose(interleaved_head_attention(**given, **options), torch.ones(()), atol=1e-4)
    assert kept.std() > 0.1
    assert abs(kept.mean() - 1) < 0.05


@pytest.mark.parametrize(("backend", "window"), [("sdpa", None), ("local", 3), ("chunked", None)])
def test_whole_graph_compiles(backend: str, window: int | None) -> None:
    given = tensors(N=12, G=2, dtype=torch.float32)
    torch.compiler.reset()  # other tests compile it too, and after eight ways it gives up
    compiled = torch.compile(interleaved_head_attention, fullgraph=True)
    output = compiled(**given, window=window, backend=backend)
    expected = interleaved_head_attention(**given, window=window, backend="reference")
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
