"""Mixing, turning, interleaving and collapsing against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iha.checks import checked_call
from iha.mixing import (
    collapse_heads,
    collapse_tokens,
    interleaved_inputs,
    interleaved_output,
    mix,
    mix_tokens,
    paired,
    rotate_by_phase,
)
from iha.rotary import inverse_frequencies, phase_tables, rotate
from tests.arguments import tensors

sizes = st.integers(1, 4)
batches = st.lists(st.integers(1, 3), max_size=2)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(batch=batches, H=sizes, h=sizes, P=sizes, N=sizes, d=sizes)
def test_mix_is_its_definition(batch: list[int], H: int, h: int, P: int, N: int, d: int) -> None:
    base, alpha = random(*batch, H, N, d), random(H, h, P)
    expected = torch.einsum("...mnd,mhp->...hpnd", base, alpha)
    torch.testing.assert_close(mix(base, alpha), expected)


@settings(max_examples=40, deadline=None)
@given(batch=batches, H=sizes, h=sizes, P=sizes, N=sizes, d=sizes)
def test_collapse_is_its_definition(
    batch: list[int], H: int, h: int, P: int, N: int, d: int
) -> None:
    pseudo, collapse = random(*batch, h, P, N, d), random(H, h, P)
    expected = torch.einsum("...hpnd,ohp->...ond", pseudo, collapse)
    torch.testing.assert_close(collapse_heads(pseudo, collapse), expected)


@settings(max_examples=20, deadline=None)
@given(batch=batches, h=sizes, P=sizes, N=sizes, d=sizes)
def test_a_per_head_collapse_is_a_diagonal_one(
    batch: list[int], h: int, P: int, N: int, d: int
) -> None:
    pseudo, collapse = random(*batch, h, P, N, d), random(h, P)
    diagonal = collapse.T.diag_embed().permute(1, 2, 0)
    expected = collapse_heads(pseudo, diagonal)
    torch.testing.assert_close(collapse_heads(pseudo, collapse), expected)


def test_the_papers_matrix_has_column_h_times_P_plus_p() -> None:
    pseudo, collapse = random(1, 3, 2, 5, 4), random(3, 3, 2)
    columns = pseudo.reshape(6, 20)  # row h·P + p
    expected = (collapse.reshape(3, 6) @ columns).reshape(1, 3, 5, 4)
    torch.testing.assert_close(collapse_heads(pseudo, collapse), expected)


def test_mixing_takes_strided_views() -> None:
    whole, alpha = random(2, 6, 3, 8), random(3, 3, 2)
    view = whole.transpose(1, 2)[:, :, 1:4, ::2]
    assert not view.is_contiguous()
    torch.testing.assert_close(mix(view, alpha), mix(view.contiguous(), alpha), atol=0, rtol=0)


def test_mixing_casts_the_weights_and_not_the_heads() -> None:
    base, alpha = random(1, 3, 2, 4).bfloat16(), random(3, 3, 2)
    assert torch.equal(mix(base, alpha), mix(base, alpha.bfloat16()))
    pseudo, collapse = random(1, 3, 2, 5, 4).bfloat16(), random(3, 2)
    for weights in (collapse, random(3, 3, 2)):
        output = collapse_heads(pseudo, weights)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, collapse_heads(pseudo, weights.bfloat16()))


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_of_mixing(size: int) -> None:
    base, alpha = random(2, 2, 2, 2).requires_grad_(), random(2, 3, size).requires_grad_()
    assert torch.autograd.gradcheck(mix, (base, alpha))
    pseudo = random(2, 3, size, 2, 2).requires_grad_()
    for weights in (random(2, 3, size), random(3, size)):
        assert torch.autograd.gradcheck(collapse_heads, (pseudo, weights.requires_grad_()))


@settings(max_examples=20, deadline=None)
@given(h=sizes, P=sizes, N=sizes, d=sizes)
def test_virtual_token_i_is_pseudo_head_p_of_token_n(h: int, P: int, N: int, d: int) -> None:
    base, alpha, collapse = random(2, 3, N, d), random(3, h, P), random(3, h, P)
    pseudo, tokens = mix(base, alpha), mix_tokens(base, alpha)
    virtual = tokens.view(2, N * P, h, d)
    for n in range(N):
        for p in range(P):
            torch.testing.assert_close(virtual[:, n * P + p], pseudo[:, :, p, n])
    for weights in (collapse, collapse[0]):
        found = collapse_tokens(tokens, weights)
        torch.testing.assert_close(found, collapse_heads(pseudo, weights))


@pytest.mark.parametrize("convention", ["half", "pairs"])
def test_turning_has_first_and_second_derivatives(convention: Any) -> None:
    phase = tuple(t.double() for t in phase_tables(2, inverse_frequencies(4), "virtual") or ())
    pseudo = random(1, 2, 3, 6).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda heads: rotate_by_phase(heads, phase, convention).square(), (pseudo,))  # type: ignore[arg-type]


@pytest.mark.parametrize("convention", ["half", "pairs"])
def test_turn_rotates_every_token_of_a_pseudo_head_by_one_phase(convention: str) -> None:
    pseudo = random(2, 3, 4, 5, 6)
    cos, sin = phase = phase_tables(4, inverse_frequencies(6), "virtual")  # type: ignore[misc]
    turned = rotate_by_phase(pseudo, phase, convention)  # type: ignore[arg-type]
    for p in range(4):
        for n in range(5):
            expected = rotate(pseudo[:, :, p, n], (cos[p], sin[p]), convention)  # type: ignore[arg-type]
            torch.testing.assert_close(turned[:, :, p, n], expected)
    assert not torch.allclose(turned[:, :, 1], pseudo[:, :, 1])


def test_without_a_phase_nothing_turns() -> None:
    pseudo = random(1, 2, 3, 4, 6)
    assert rotate_by_phase(pseudo, None, "half") is pseudo


def test_queries_and_keys_turn_and_values_do_not() -> None:
    phase = phase_tables(3, inverse_frequencies(4), "virtual")
    given = tensors(G=2, S=9)
    call = checked_call(**given, phase=phase, rotary="pairs")
    query, key, value = interleaved_inputs(call)
    for got, base, alpha, angles in (
        (query, "query", "alpha_q", phase),
        (key, "key", "alpha_k", phase),
        (value, "value", "alpha_v", None),
    ):
        expected = rotate_by_phase(mix(given[base], given[alpha]), angles, "pairs").transpose(2, 3)
        expected = expected.flatten(2, 3)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("convention", ["half", "pairs"])
def test_dimensions_in_another_order_give_the_same_scores(convention: Any) -> None:
    given = tensors(G=4, S=9, d=6)
    phase = phase_tables(3, inverse_frequencies(4), "virtual")  # the last two dimensions stay
    call = checked_call(**given, phase=phase, rotary=convention)
    query, key, _ = interleaved_inputs(call)
    turned_query, turned_key, _ = interleaved_inputs(paired(call))
    torch.testing.assert_close(turned_query @ turned_key.mT, query @ key.mT)
    assert torch.equal(turned_query, query) == (convention == "pairs")


def test_the_output_is_uninterleaved_and_collapsed() -> None:
    given = tensors(G=2)
    virtual = random(2, 4, 21, 4)
    pseudo = virtual.reshape(2, 4, 7, 3, 4)
    expected = torch.einsum("bhnpd,ohp->bond", pseudo, given["collapse"])
    torch.testing.assert_close(interleaved_output(checked_call(**given), virtual), expected)
