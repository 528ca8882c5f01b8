"""Decoding steps: what they read and write, in chunks and out of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from iha import interleaved_head_attention
from iha.backends import chunked
from tests.arguments import NAMES, arguments, tensors


class Written(TorchDispatchMode):
    """Bytes of the new tensors that operations make: of the largest, and of all together."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.untyped_storage().data_ptr() not in known:
                size = tensor.untyped_storage().nbytes()
                self.largest, self.total = max(self.largest, size), self.total + size
        return result


def written(backend: str = "auto", *, phase: Any = None, **options: Any) -> Written:
    sizes = {name: options.pop(name) for name in tuple(options) if name in ("S", "N", "P", "G")}
    given = tensors(**{"B": 1, "H": 8, "d": 64, "N": 1, "dtype": torch.float32, **sizes})
    with Written() as found:
        interleaved_head_attention(**given, phase=phase, **options, backend=backend)
    return found


@pytest.mark.parametrize("by", ["numbers", "vectors"])
def test_every_argument_in_many_chunks(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": 2000})
    monkeypatch.setattr(chunked, "BLOCK", 2)
    monkeypatch.setattr(
        chunked, "_mixes_numbers", lambda call: by == "numbers" and call.phase is None
    )

    @settings(max_examples=80, deadline=None)
    @given(arguments(softcap=True))
    def check(arguments: dict[str, Any]) -> None:
        expected = interleaved_head_attention(**arguments, backend="reference")
        found = interleaved_head_attention(**arguments, backend="chunked")
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)

    check()


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(-2.0, 2.0), S=st.integers(1, 9))
def test_a_scale_of_any_sign(scale: float, S: int) -> None:
    given = tensors(N=1, S=S)
    expected = interleaved_head_attention(**given, scale=scale, backend="reference")
    found = interleaved_head_attention(**given, scale=scale, backend="chunked")
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("P", [2, 4])
@pytest.mark.parametrize("G", [2, 8])
@pytest.mark.parametrize("turned", [False, True])
def test_a_step_writes_no_tensor_of_the_caches_size(G: int, P: int, turned: bool) -> None:
    angle = torch.rand(P, 32)
    phase = (angle.cos(), angle.sin()) if turned else None
    for S in (8192, 32768):
        cache = 2 * G * S * 64 * 4
        assert written(S=S, G=G, P=P, phase=phase).largest < min(cache / 2, 4 * 2**20)


def test_a_step_writes_a_fraction_of_what_mixing_the_cache_would() -> None:
    """Scores and weights: P·H·(1 + 2G + 3P) numbers a token or so, and no vectors."""
    step, mixed = written(S=8192, G=2, P=4), written("sdpa", S=8192, G=2, P=4)
    assert step.total < mixed.total / 2
    longer = written(S=4 * 8192, G=2, P=4)
    assert longer.total < 4.2 * step.total


def test_a_windows_step_does_not_know_how_long_the_cache_is() -> None:
    short, long = (written(S=S, window=64, P=4) for S in (1024, 65536))
    assert short.total == long.total
    offset = [written(S=S, window=64, P=4, query_offset=torch.tensor(500)) for S in (1024, 65536)]
    assert offset[0].total == offset[1].total < 1.1 * short.total


def test_what_is_filled_of_a_static_cache_is_all_that_is_read() -> None:
    filled, static = written(S=512), written(S=65536, query_offset=torch.tensor(511))
    assert static.total < 1.01 * filled.total


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores_of_half_precision_stay_finite(dtype: torch.dtype) -> None:
    given = tensors(N=1, S=200, d=64, P=2, dtype=dtype)
    given["query"], given["key"] = given["query"] * 90, given["key"] * 90
    exact = {name: tensor.double() for name, tensor in given.items()}
    expected = interleaved_head_attention(**exact, backend="reference")
    found = interleaved_head_attention(**given, backend="chunked")
    assert (given["query"].double() @ given["key"].double().mT).abs().max() > 66_000
    assert found.isfinite().all()
    assert ((found.double() - expected).norm() / expected.norm()) < 0.05


def test_autocast_rounds_no_scores() -> None:
    given = tensors(N=1, S=100, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = interleaved_head_attention(**given, backend="chunked")
    expected = interleaved_head_attention(**given, backend="reference")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_number_that_is_none_is_hidden() -> None:
    for name in ("query", "key", "value"):
        given = tensors(N=1, S=50)
        given[name][0, 1, -1, 2] = torch.nan
        output = interleaved_head_attention(**given, backend="chunked")
        assert output[0].isnan().any()
        assert output[1].isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 5}, {"phase": True}, {"static": True}, {"static": True, "window": 5}],
    ids=str,
)
def test_one_graph_serves_every_length(options: dict[str, Any]) -> None:
    """The first length alone, then one for all others."""
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    torch.compiler.reset()  # other tests compile it too, and after eight ways it gives up
    compiled = torch.compile(interleaved_head_attention, fullgraph=True, backend=count)
    angle = torch.rand(3, 2)
    for S in (20, 21, 22, 40, 41, 77):
        given: dict[str, Any] = dict(tensors(N=1, S=S, G=2, dtype=torch.float32))
        given["window"] = options.get("window")
        if "phase" in options:
            given["phase"] = (angle.cos(), angle.sin())
        if "static" in options:
            given["query_offset"] = torch.tensor(S - 3)
        expected = interleaved_head_attention(**given, backend="reference")
        torch.testing.assert_close(compiled(**given), expected, atol=1e-5, rtol=1e-5)
    assert graphs <= 2


def test_gradients_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": 2000})
    given = tensors(N=2, S=60, G=2)
    found = []
    for backend in ("chunked", "reference"):
        leaves = {name: given[name].clone().requires_grad_() for name in NAMES}
        output = interleaved_head_attention(**leaves, softcap=3.0, backend=backend)
        found.append(torch.autograd.grad(output.square().sum(), list(leaves.values())))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)
