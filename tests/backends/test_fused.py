"""The Triton kernels, under Triton's interpreter, against the definition."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

import iha
from iha.backends import fused
from iha.call import Call
from iha.checks import checked_call
from iha.kernels import configs, launch, ops
from iha.kernels.layout import Tile
from tests.arguments import NAMES, arguments, tensors

EPS = torch.finfo(torch.float32).eps


@st.composite
def tiles(draw: st.DrawFn) -> configs.Config:
    """Tiles so small that a few tokens and pseudo-heads need several, the last ones in part."""
    rows, tokens = st.sampled_from([4, 16]), st.sampled_from([4, 8])
    return configs.Config(Tile(draw(rows), draw(tokens)), Tile(draw(rows), draw(tokens)))


@contextlib.contextmanager
def with_tiles(found: configs.Config) -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "config", lambda kernel, shape: found)
        yield


def exact(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call in float64."""
    return {name: value.double() if name in NAMES else value for name, value in arguments.items()}


def differentiated(arguments: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
    """Output and gradients of a call. The weight makes no two outputs count alike."""
    leaves = {name: arguments[name].clone().requires_grad_() for name in NAMES}
    output = iha.interleaved_head_attention(**{**arguments, **leaves}, backend=backend)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output.detach(), *torch.autograd.grad((output * weight).sum(), list(leaves.values()))


@settings(max_examples=8)
@given(arguments(dtype=torch.float32, softcap=True), tiles())
def test_outputs_and_gradients(arguments: dict[str, Any], tiles: configs.Config) -> None:
    expected = differentiated(exact(arguments), "reference")
    with with_tiles(tiles):
        found = differentiated(arguments, "fused")
    for got, wanted in zip(found, expected, strict=True):
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(got.double(), wanted, atol=100 * EPS * scale, rtol=0.0)


@settings(max_examples=20)
@given(arguments(dtype=torch.float32, softcap=True))
def test_decoding(arguments: dict[str, Any]) -> None:
    """Without gradients up to 8 queries go to the decoding kernel; here any number do."""
    expected = iha.interleaved_head_attention(**exact(arguments), backend="reference")
    found = launch.run_decode(checked_call(**{**arguments, "collapse": _square(arguments)}))
    torch.testing.assert_close(found.double(), expected, atol=100 * EPS, rtol=100 * EPS)


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"causal": None, "window": 30}])
def test_decoding_splits_the_keys(options: dict[str, Any]) -> None:
    """Several splits of several tiles each, some of them empty behind the last query."""
    given = tensors(B=1, H=4, G=2, N=2, S=200, d=8, P=2, dtype=torch.float32)
    given |= {"query_offset": 150, **options}
    call = checked_call(**given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "programs", lambda device: 3)
        found = launch.run_decode(call)
    expected = iha.interleaved_head_attention(**exact(given), backend="reference")
    torch.testing.assert_close(found.double(), expected, atol=100 * EPS, rtol=100 * EPS)


def test_decoding_under_autocast_keeps_its_dtype() -> None:
    given = tensors(N=1, S=5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = iha.interleaved_head_attention(**given, backend="fused")
    assert output.dtype == torch.float32


def test_precision_follows_pytorch() -> None:
    call = checked_call(**tensors(dtype=torch.float32))
    found = configs.config("forward", launch.shape_of(call))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for chosen in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = chosen
            assert launch._Launch(call).spec(found).precision == chosen
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _square(arguments: dict[str, Any]) -> Tensor:
    collapse = arguments["collapse"]
    return torch.diag_embed(collapse.T).permute(1, 2, 0) if collapse.ndim == 2 else collapse


@pytest.mark.parametrize(("pseudo_heads", "groups"), [(1, 1), (5, 2), (8, 2), (16, 1), (20, 1)])
def test_default_tiles(pseudo_heads: int, groups: int) -> None:
    """The tiles that a GPU gets."""
    given = tensors(B=1, H=groups, G=1, N=9, d=16, P=pseudo_heads, dtype=torch.float32)
    given |= {"window": 3}
    expected = differentiated(exact(given), "reference")
    for got, wanted in zip(differentiated(given, "fused"), expected, strict=True):
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(got.double(), wanted, atol=100 * EPS * scale, rtol=0.0)


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bfloat16 as its bits, and multiplies these. Read them first."""

    def widened(handle: Any) -> Any:
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        if a.dtype.scalar == interpreter.tl.bfloat16:
            a, b = widened(a), widened(b)
        return multiply(self, a, b, *arguments)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(fused, "INTERPRETED_REFUSES", ())


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("decode", [False, True])
def test_half_precision(dtype: torch.dtype, decode: bool) -> None:
    """A rounded pseudo tensor, weight or gradient is off by eps of its size; a few add up."""
    given = tensors(N=7, G=2, d=8, dtype=dtype) | {"window": 4}
    if decode:
        found = (iha.interleaved_head_attention(**given, backend="fused"),)
    else:
        found = differentiated(given, "fused")
    for got, wanted in zip(found, differentiated(exact(given), "reference"), strict=False):
        assert got.dtype == dtype
        scale = max(1.0, float(wanted.abs().max()))
        tolerance = 30 * torch.finfo(dtype).eps * scale
        torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=0.0)


def test_mixing_tensors_keep_their_precision() -> None:
    """float32 mixing tensors of a half-precision model get gradients in float32."""
    given = tensors(N=4, H=2, d=4, P=2, dtype=torch.float16)
    mixing = {name: given[name].float().requires_grad_() for name in NAMES[3:]}
    output = iha.interleaved_head_attention(**{**given, **mixing}, backend="fused")
    output.sum().backward()
    assert all(tensor.grad is not None for tensor in mixing.values())
    assert all(tensor.grad.dtype == torch.float32 for tensor in mixing.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("grad", [False, True])
def test_any_strides(grad: bool) -> None:
    """Heads as models lay them out, (B, N, H, d), and a head dimension that is not dense."""
    given = tensors(N=5, G=2, d=4, dtype=torch.float32)
    expected = iha.interleaved_head_attention(**given, backend="reference")
    given["query"] = given["query"].transpose(1, 2).contiguous().transpose(1, 2)
    given["key"] = given["key"].mT.contiguous().mT
    given["value"] = torch.cat((given["value"],) * 2, dim=-1)[..., :4].requires_grad_(grad)
    output = iha.interleaved_head_attention(**given, backend="fused")
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    if grad:
        output.sum().backward()  # an expanded gradient: every stride is 0


@settings(max_examples=10)
@given(data=st.data())
def test_causality_by_influence(data: st.DataObject) -> None:
    """Changing token t changes no output before t, in another document, or beyond the window."""
    causal = data.draw(st.sampled_from(["flat", "token"]))
    window = data.draw(st.one_of(st.none(), st.integers(1, 5)))
    t = data.draw(st.integers(0, 8))
    given = tensors(B=1, H=2, G=1, N=9, P=3, dtype=torch.float32, seed=data.draw(st.integers(0, 9)))
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]]) if data.draw(st.booleans()) else None
    options = {"causal": causal, "window": window, "document_ids": ids, "backend": "fused"}
    before = iha.interleaved_head_attention(**given, **options)
    for name in ("query", "key", "value"):
        given[name] = given[name].clone()
        given[name][:, :, t] += 1.0
    changed = (iha.interleaved_head_attention(**given, **options) != before).any(-1).any(1)[0]
    reach = 9 if window is None else window + (causal == "flat")
    for n in range(9):
        same_document = ids is None or bool(ids[0, n] == ids[0, t])
        assert not changed[n] or (t <= n < t + reach and same_document)
    assert changed[t]


@pytest.mark.parametrize("grad", [False, True])
def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients(grad: bool) -> None:
    given = tensors(N=6, H=2, dtype=torch.float32)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[:, :, 2] = False
    leaves = {name: value.requires_grad_(grad) for name, value in given.items()}
    output = iha.interleaved_head_attention(**leaves, attn_mask=mask, backend="fused")
    assert (output[:, :, 2] == 0).all()
    assert (output[:, :, 3] != 0).all()
    if grad:
        output.sum().backward()
        assert all(leaf.grad.isfinite().all() for leaf in leaves.values())  # type: ignore[union-attr]


# From 2.14 on opcheck clones its inputs and then reads the clones' `.grad`.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("offset", [4, torch.tensor(4)])
@pytest.mark.parametrize("decode", [False, True])
def test_operators_are_sound(offset: Any, decode: bool) -> None:
    given = tensors(B=1, H=2, G=1, N=3, S=8, d=4, P=2, dtype=torch.float32)
    angle = torch.rand(2, 1)
    call = checked_call(**given, window=4, query_offset=offset, phase=(angle.cos(), angle.sin()))
    given_to_it = list(ops.taken_apart(call))
    if decode:
        torch.library.opcheck(ops.fused_decode, given_to_it)
        return
    for tensor in given_to_it[: len(NAMES)]:
        tensor.requires_grad_()
    torch.library.opcheck(ops.fused, given_to_it)


def test_whole_graph_compiles() -> None:
    given = tensors(N=6, G=2, dtype=torch.float32)
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    torch.compiler.reset()  # other tests compile it too, and after eight ways it gives up
    compiled = torch.compile(iha.interleaved_head_attention, fullgraph=True)
    output = compiled(**leaves, window=3, backend="fused")
    expected = iha.interleaved_head_attention(**leaves, window=3, backend="reference")
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    found, wanted = (
        torch.autograd.grad(o.sum(), list(leaves.values())) for o in (output, expected)
    )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout_p": 0.1}, "no dropout; 'local'"),
        ({"dtype": torch.float64}, "not in float64; 'local'"),
        ({"P": 33}, "up to 32 pseudo-heads, not 33"),
        ({"d": 3}, "an even head dimension of up to 256, not 3"),
        ({"d": 258}, "not 258"),
        ({"B": 0}, "the batch is empty"),
        ({"dtype": torch.bfloat16}, "no products of bfloat16"),
        ({"backend": "streamed:fused"}, "needs no 'streamed'"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    options = {"window": 2, "backend": "fused"}
    sizes: dict[str, Any] = {"H": 2, "N": 4, "dtype": torch.float32}
    for name, value in change.items():
        (options if name in ("dropout_p", "backend") else sizes)[name] = value
    with pytest.raises(ValueError, match=message):
        iha.interleaved_head_attention(**tensors(**sizes), **options)


def test_a_sequence_must_fit_32_bits() -> None:
    given = tensors(B=1, H=2, N=1, d=2, P=2, dtype=torch.float32)
    given["key"] = given["value"] = torch.empty(1).expand(1, 2, 2**30, 2)
    with pytest.raises(
        ValueError, match="1073741824 tokens of 2 pseudo-heads, or 4294967296 numbers"
    ):
        iha.interleaved_head_attention(**given, backend="fused")


def sentence(call: Call) -> str:
    why = fused.refusal(call)
    return "" if why is None else why()


def test_without_triton_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    call = checked_call(**tensors(dtype=torch.float32))
    monkeypatch.setattr(fused, "INTERPRETED", False)
    assert "need a CUDA device, not cpu" in sentence(call)
    monkeypatch.setattr(fused, "INSTALLED", False)
    assert "triton, which cannot be imported" in sentence(call)
