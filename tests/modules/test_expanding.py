"""Virtual tokens for an attention call of one's own, between `expand` and `reduce`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iha import HeadMixing, inverse_frequencies, phase_tables, window_from_flash
from tests.backends.flash_packages import attention, infinite


def trained(H: int = 4, *, dtype: torch.dtype = torch.float64, **options: Any) -> HeadMixing:
    torch.manual_seed(0)
    mixing = HeadMixing(H, init="upcycle", dtype=dtype, **options)
    with torch.no_grad():
        for parameter in mixing.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return mixing


def heads(
    H: int = 4, G: int = 2, N: int = 7, S: int = 7, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, tokens, h, 8, dtype=dtype) for tokens, h in ((N, H), (S, G), (S, G))]


def own_kernel(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]
) -> Tensor:
    """What FlashAttention documents: layout, window and alignment."""
    return attention(q, k, v, q.shape[-1] ** -0.5, causal, infinite(window_size), 0.0)


def through_own_kernel(
    mixing: HeadMixing, q: Tensor, k: Tensor, v: Tensor, window: int | None, **positions: Any
) -> Tensor:
    q, k, v = mixing.expand(q, k, v, layout="bshd", **positions)
    y = own_kernel(q, k, v, causal=True, window_size=mixing.flash_window(window))
    return mixing.reduce(y)


def reference(mixing: HeadMixing, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return mixing(q, k, v, layout="bshd", backend="reference", **options)


@settings(max_examples=60, deadline=None)
@given(
    G=st.integers(1, 3),
    groups=st.integers(1, 3),
    P=st.integers(1, 4),
    N=st.integers(1, 8),
    past=st.integers(0, 5),
    window=st.one_of(st.none(), st.integers(1, 14)),
    mode=st.sampled_from(["token", "virtual", "fractional"]),
    rotary=st.sampled_from(["half", "pairs"]),
    per_head=st.booleans(),
)
def test_a_kernel_of_ones_own_gives_the_definition(
    G: int,
    groups: int,
    P: int,
    N: int,
    past: int,
    window: int | None,
    mode: Any,
    rotary: Any,
    per_head: bool,
) -> None:
    H = G * groups
    mixing = trained(H, num_kv_heads=G, pseudo_heads=P, per_head_collapse=per_head)
    bases = heads(H, G, N, N + past)
    positions = {"phase": phase_tables(P, inverse_frequencies(8), mode), "rotary": rotary}
    output = through_own_kernel(mixing, *bases, window=window, **positions)
    expected = reference(mixing, *bases, window=window, **positions)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)


def test_what_is_given_out_is_contiguous_and_its_shapes_are_virtual() -> None:
    mixing, bases = trained(num_kv_heads=2, pseudo_heads=3), heads(S=9)
    phase = phase_tables(3, inverse_frequencies(8), "virtual")
    virtual = mixing.expand(*bases, phase=phase)
    assert [t.shape for t in virtual] == [(2, 21, 4, 8), (2, 27, 2, 8), (2, 27, 2, 8)]
    assert all(t.is_contiguous() for t in virtual)
    output = mixing.reduce(virtual[0])
    assert output.shape == (2, 7, 4, 8)
    assert output.is_contiguous()


def test_heads_first_is_the_same_transposed() -> None:
    mixing, bases = trained(num_kv_heads=2, pseudo_heads=3), heads()
    virtual = mixing.expand(*bases)
    turned = mixing.expand(*(t.transpose(1, 2) for t in bases), layout="bhsd")
    for one, other in zip(virtual, turned, strict=True):
        torch.testing.assert_close(one, other.transpose(1, 2))
    expected = mixing.reduce(virtual[0]).transpose(1, 2)
    torch.testing.assert_close(mixing.reduce(turned[0], layout="bhsd"), expected)


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_are_those_of_the_definition(window: int | None) -> None:
    gradients = []
    for function in (through_own_kernel, reference):
        mixing, bases = trained(num_kv_heads=2, pseudo_heads=3), heads()
        leaves = [t.requires_grad_() for t in bases]
        function(mixing, *leaves, window=window).square().sum().backward()
        gradients.append([t.grad for t in (*leaves, *mixing.parameters())])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("window", [None, 3])
def test_it_compiles_whole(window: int | None) -> None:
    torch.compiler.reset()
    mixing = trained(num_kv_heads=2, pseudo_heads=3)
    compiled = torch.compile(through_own_kernel, fullgraph=True, backend="aot_eager")
    for N in (7, 9, 12):
        bases = heads(N=N, S=N)
        expected = reference(mixing, *bases, window=window)
        torch.testing.assert_close(compiled(mixing, *bases, window=window), expected)


def test_half_precision_activations_and_float32_mixing() -> None:
    mixing = trained(num_kv_heads=2, pseudo_heads=3, dtype=torch.float32)
    bases = heads(dtype=torch.bfloat16)
    output = through_own_kernel(mixing, *bases, window=3)
    assert output.dtype == torch.bfloat16
    expected = reference(mixing, *(t.float() for t in bases), window=3)
    torch.testing.assert_close(output.float(), expected, atol=0.15, rtol=0.05)


def test_fewer_pseudo_queries_are_a_causal_sequence_only_one_by_one() -> None:
    mixing = trained(num_kv_heads=2, pseudo_heads=3, pseudo_queries=2)
    with pytest.raises(ValueError, match=r"^pseudo_queries = 2 of pseudo_heads = 3 .* got 7;"):
        mixing.expand(*heads())
    for window in (None, 3):
        bases = heads(N=1, S=9)
        output = through_own_kernel(mixing, *bases, window=window)
        torch.testing.assert_close(output, reference(mixing, *bases, window=window))


def test_an_output_of_other_heads_is_refused() -> None:
    mixing = trained(num_kv_heads=2, pseudo_heads=3)
    for shape, layout in (
        ((2, 20, 4, 8), "bshd"),
        ((2, 4, 21, 8), "bshd"),
        ((2, 21, 4, 8), "bhsd"),
    ):
        with pytest.raises(ValueError, match=r"^output must have 4 heads and a multiple of 3 vir"):
            mixing.reduce(torch.randn(shape), layout=layout)  # type: ignore[arg-type]


@pytest.mark.parametrize("left", [-1, 0, 2, 5])
def test_a_window_of_flash_attention_is_one_token_longer_than_it_says(left: int) -> None:
    """An upcycled model that attends through (left, 0) stays what it was."""
    bases = heads()
    window = window_from_flash((left, 0))
    assert window == (None if left == -1 else left + 1)
    expected = own_kernel(*bases, causal=True, window_size=(left, 0))
    for P in (1, 3):
        mixing = HeadMixing(4, num_kv_heads=2, pseudo_heads=P, init="upcycle", dtype=torch.float64)
        torch.testing.assert_close(mixing(*bases, window=window, layout="bshd"), expected)
        torch.testing.assert_close(through_own_kernel(mixing, *bases, window=window), expected)
    assert mixing.flash_window(window) == ((-1, 0) if window is None else (3 * window - 1, 0))
    assert HeadMixing(4, pseudo_heads=1, init="upcycle").flash_window(window) == (left, 0)


def test_a_window_of_flash_attention_that_no_w_says_is_refused() -> None:
    assert window_from_flash((None, None)) is window_from_flash((-1, -1)) is None
    assert window_from_flash((4, 4)) == 5
    for size in ((4, 2), (4, -1), (-1, 3), (-2, 0)):
        with pytest.raises(ValueError, match=r"^window_size must be \(left, 0\)"):
            window_from_flash(size)
