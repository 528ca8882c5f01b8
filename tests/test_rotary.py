"""Rotary positions: the modes, and that a token's rotation and a pseudo-head's phase add up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iha import HeadMixing
from iha.mixing import mix, rotate_by_phase
from iha.rotary import inverse_frequencies, phase_tables, rotary_tables, rotate

conventions = st.sampled_from(["half", "pairs"])


def angles(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.atan2(sin, cos)


def test_frequencies_are_powers_of_the_base() -> None:
    expected = torch.tensor([100.0 ** (-2 * i / 6) for i in range(3)])
    torch.testing.assert_close(inverse_frequencies(6, 100.0), expected)
    assert inverse_frequencies(6)[1].item() == pytest.approx(10000 ** (-1 / 3))


def test_tables_are_float32_whatever_comes() -> None:
    frequencies = inverse_frequencies(4)
    for cast in (frequencies, frequencies.double(), frequencies.bfloat16()):
        cos, sin = rotary_tables(torch.arange(3), cast)
        assert (cos.dtype, sin.dtype) == (torch.float32, torch.float32)
        assert cos.shape == sin.shape == (3, 2)
    cos, sin = rotary_tables(torch.arange(6).view(2, 3), frequencies)
    assert cos.shape == (2, 3, 2)
    assert cos[1, 2, 1].item() == pytest.approx(math.cos(5 * 0.01))
    assert sin[1, 2, 1].item() == pytest.approx(math.sin(5 * 0.01))


@pytest.mark.parametrize(
    ("mode", "positions"), [("virtual", [0, 1, 2, 3]), ("fractional", [0, 0.25, 0.5, 0.75])]
)
def test_the_phase_of_pseudo_head_p(mode: Any, positions: list[float]) -> None:
    frequencies = inverse_frequencies(6)
    cos, sin = phase_tables(4, frequencies, mode)  # type: ignore[misc]
    expected = torch.tensor(positions)[:, None] * frequencies
    torch.testing.assert_close(angles(cos, sin), expected)


def test_tokens_that_turn_as_one_have_no_phase() -> None:
    assert phase_tables(4, inverse_frequencies(6), "token") is None


@settings(max_examples=30, deadline=None)
@given(P=st.integers(1, 8), width=st.integers(1, 8), base=st.floats(10, 1e6))
def test_virtual_is_fractional_with_every_frequency_times_P(
    P: int, width: int, base: float
) -> None:
    frequencies = inverse_frequencies(2 * width, base)
    virtual = phase_tables(P, frequencies, "virtual")
    stretched = phase_tables(P, P * frequencies, "fractional")
    torch.testing.assert_close(virtual, stretched)
    n = torch.arange(50)  # and so do the rotations of the tokens
    of_tokens = rotary_tables(n * P, frequencies), rotary_tables(n, P * frequencies)
    torch.testing.assert_close(*of_tokens, atol=1e-4, rtol=0)


@settings(max_examples=30, deadline=None)
@given(convention=conventions, r=st.integers(1, 3), P=st.integers(1, 4), mode=st.booleans())
def test_rotated_bases_and_a_phase_are_rotated_pseudo_heads(
    convention: Any, r: int, P: int, mode: bool
) -> None:
    """Mixing commutes with the token's rotation: pseudo-head p of token n has position n·P + p."""
    base = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    alpha = torch.randn(3, 3, P, dtype=torch.float64)
    frequencies, stride = inverse_frequencies(2 * r), P if mode else 1
    of_tokens = rotary_tables(torch.arange(5) * stride, frequencies)
    phase = phase_tables(P, frequencies, "virtual" if mode else "fractional")
    output = rotate_by_phase(mix(rotate(base, of_tokens, convention), alpha), phase, convention)

    n, p = torch.arange(5), torch.arange(P)[:, None]
    of_all = rotary_tables(n * P + p if mode else n + p / P, frequencies)
    expected = rotate(mix(base, alpha), of_all, convention)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None)
@given(convention=conventions, r=st.integers(1, 3))
def test_a_rotation_pairs_the_dimensions_that_its_convention_names(convention: Any, r: int) -> None:
    x, angle = torch.randn(6, dtype=torch.float64), torch.randn(r, dtype=torch.float64)
    expected = x.clone()
    for i in range(r):
        a, b = (i, i + r) if convention == "half" else (2 * i, 2 * i + 1)
        turned = torch.complex(x[a], x[b]) * torch.polar(torch.ones_like(x[0]), angle[i])
        expected[a], expected[b] = turned.real, turned.imag
    output = rotate(x[None], (angle.cos()[None], angle.sin()[None]), convention)[0]
    torch.testing.assert_close(output, expected)
    assert torch.equal(output[2 * r :], x[2 * r :])  # partial rotary: the rest passes


@settings(max_examples=20, deadline=None)
@given(convention=conventions, shift=st.integers(0, 1000))
def test_scores_depend_on_distance_alone(convention: Any, shift: int) -> None:
    query, key = torch.randn(2, 7, 8, dtype=torch.float64)
    frequencies = inverse_frequencies(8)

    def scores(first: int) -> torch.Tensor:
        tables = rotary_tables(torch.arange(first, first + 7), frequencies)
        return rotate(query, tables, convention) @ rotate(key, tables, convention).T

    torch.testing.assert_close(scores(shift), scores(0), atol=2e-3, rtol=0)
    assert not torch.allclose(scores(0), query @ key.T, atol=0.1)


@pytest.mark.parametrize("convention", ["half", "pairs"])
def test_rotation_keeps_the_dtype(convention: Any) -> None:
    x = torch.randn(3, 4)
    tables = rotary_tables(torch.arange(3), inverse_frequencies(4))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert rotate(x.to(dtype), tables, convention).dtype == dtype


def test_a_stride_spreads_positions() -> None:
    frequencies, n = inverse_frequencies(6), torch.arange(5)
    torch.testing.assert_close(
        rotary_tables(n, frequencies, stride=3), rotary_tables(3 * n, frequencies)
    )


@pytest.mark.parametrize("mode", ["virtual", "fractional"])
def test_a_model_that_rotates_clockwise_has_a_phase_that_does(mode: Any) -> None:
    """It is the model with the two halves of each head swapped; with the other phase it is not."""
    P, frequencies = 3, inverse_frequencies(8)
    mixing = HeadMixing(4, pseudo_heads=P, init="scratch", dtype=torch.float64)
    heads = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64)
    cos, sin = rotary_tables(torch.arange(7), frequencies, stride=P if mode == "virtual" else 1)

    def output(sign: int, clockwise: bool) -> torch.Tensor:
        swapped = heads[:2] if sign > 0 else heads[:2].roll(4, -1)
        query, key = (rotate(t, (cos, sign * sin), "half") for t in swapped)
        phase = phase_tables(P, frequencies, mode, clockwise=clockwise)
        return mixing(query, key, heads[2], phase=phase)

    torch.testing.assert_close(output(-1, True), output(1, False), atol=1e-6, rtol=0)
    assert (output(-1, False) - output(1, False)).abs().max() > 0.01


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^mode must be one of 'token', .* got 'none'"):
        phase_tables(2, inverse_frequencies(4), "none")  # type: ignore[arg-type]
