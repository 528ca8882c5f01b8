"""Numbers at the edge: every backend says what `reference` says, or one sentence refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from iha import interleaved_head_attention
from iha.backends import BACKENDS
from iha.checks import checked_call
from tests.arguments import NAMES, tensors

NAMED = [*BACKENDS, "streamed:sdpa"]
SCALES = [0, -0.3, 1e-45, -1e-320, 1e17, -1e17]
HALF = [torch.float32, torch.bfloat16, torch.float16]


def attend(backend: str, given: dict[str, Tensor], **options: Any) -> Tensor:
    """What `backend` gives; a test that it cannot run is skipped."""
    able = BACKENDS.get(backend)
    if able is not None and (why := able.refusal(checked_call(**given, **options))) is not None:
        pytest.skip(why())
    return interleaved_head_attention(**given, backend=backend, **options)


def check(backend: str, dtype: torch.dtype, **options: Any) -> None:
    given = tensors(G=2, N=9, d=16, dtype=dtype)
    output = attend(backend, given, **options)
    exact = {name: tensor.double() for name, tensor in given.items()}
    expected = interleaved_head_attention(**exact, backend="reference", **options)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", NAMED)
def test_any_scale(backend: str, scale: float, window: int | None) -> None:
    """PyTorch's causal attention gives NaN on a CPU where the scale is not positive."""
    if backend == "flex" and (window or scale not in (0, -1e17)):
        pytest.skip("each scale is compiled, for seconds")
    check(backend, torch.float32, scale=scale, window=window)


@pytest.mark.parametrize("dtype", HALF[1:])
@pytest.mark.parametrize("scale", [0, -0.3, 1e17])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "streamed:sdpa"])
def test_any_scale_in_half_precision(backend: str, scale: float, dtype: torch.dtype) -> None:
    check(backend, dtype, scale=scale)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("softcap", [1e-18, 1e-5, 1e6, 1e17])
@pytest.mark.parametrize("backend", ["reference", "local"])
def test_any_softcap(backend: str, softcap: float, dtype: torch.dtype) -> None:
    """In float16, score / softcap would be 0 and score · scale infinite."""
    check(backend, dtype, softcap=softcap, window=4)


def test_scores_beyond_float16_are_capped() -> None:
    check("local", torch.float16, softcap=3.0, scale=1e6, window=4)


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("number", [2.0**70, 1e300, 10**400, -(2.0**70), float("nan")])
def test_numbers_that_float32_cannot_work_with_are_refused(name: str, number: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be a finite number .* got"):
        interleaved_head_attention(**tensors(), **{name: number})
    with pytest.raises(ValueError, match=r"^softcap must be .* at least 1e-18 .* got 1e-30"):
        interleaved_head_attention(**tensors(), softcap=1e-30)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("name", [*NAMES])
@pytest.mark.parametrize("backend", NAMED)
def test_what_is_broken_is_seen(backend: str, name: str, window: int | None) -> None:
    """PyTorch's attention on a CPU gives zeros for a query that is NaN."""
    given = tensors(B=2, N=9, d=16, P=1, dtype=torch.float32)
    given[name].view(-1)[-1] = float("nan")  # of the last token, batch element and head
    output = attend(backend, given, window=window)
    assert output[-1, :, -1].isnan().any()
    if name in NAMES[:3]:
        assert output[0].isfinite().all()  # another batch element


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"causal": "token"}, {"window": 3}], ids=str)
def test_the_reference_is_computed_in_float32_under_autocast(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    given = {name: tensor.requires_grad_() for name, tensor in tensors(dtype=torch.float32).items()}

    def run() -> Tensor:
        return interleaved_head_attention(**given, softcap=5.0, backend="reference", **options)

    expected = run()
    with torch.autocast("cpu", dtype=dtype):
        output = run()
    found, wanted = (
        (o, *torch.autograd.grad(o.square().sum(), list(given.values())))
        for o in (output, expected)
    )
    assert all(map(torch.equal, found, wanted))
