"""Polynomial filters with ⌈√k⌉ heads, and what happens with less."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from iha_lab.theory import filters
from iha_lab.theory.filters import EXACT, ORDERS, D, N, block_error, filter_bank, problem, tokens
from iha_lab.theory.layer import Layer, random


def test_everything_is_reproduced() -> None:
    found = filters.findings(filters.parameter_counts(ORDERS))
    assert len(found) == 6 * len(ORDERS) + 2
    assert [finding.claim for finding in found if not finding.holds] == []


def test_the_problem_is_as_the_theorem_wants_it() -> None:
    A, X = problem()
    assert torch.linalg.matrix_rank(A) == N
    assert torch.linalg.eigvals(A).abs().max() == pytest.approx(1.0)
    assert all(k * D < N for k in ORDERS)
    bank = filter_bank(A, X, 5)
    for i, block in enumerate(bank.split(D, -1)):
        torch.testing.assert_close(block, torch.linalg.matrix_power(A, i) @ X)


@pytest.mark.parametrize("k", [1, 2, 5, 7, 9, 10])
def test_the_root_is_rounded_up(k: int) -> None:
    assert filters.root(k) == math.ceil(math.sqrt(k))


@pytest.mark.parametrize("k", [2, 7, 9])
def test_both_constructions_do_it_for_any_x(k: int) -> None:
    A, _ = problem()
    X = random(torch.Generator().manual_seed(k), N, D)
    target = filter_bank(A, X, k)
    few = filters.iha(A, filters.root(k))
    assert few.w_q.shape[0] == filters.root(k)
    assert block_error(few.attend_linearly(tokens(X)), target) < EXACT
    assert block_error(filters.mha(A, k).attend_linearly(tokens(X)), target) < EXACT


def test_a_wrong_power_or_a_missing_key_head_is_seen() -> None:
    A, X = problem()
    right, target = filters.iha(A, 3), filter_bank(A, X, 9)
    assert right.mixing is not None
    wrong_power = dataclasses.replace(right, w_q=filters.iha(A, 2).w_q[[0, 1, 1]])
    without = right.mixing.alpha_k.clone()
    without[:, :, 2] = 0
    missing = dataclasses.replace(right, mixing=right.mixing._replace(alpha_k=without))
    for broken in (wrong_power, missing):
        assert block_error(broken.attend_linearly(tokens(X)), target) > 0.1


def test_mha_with_fewer_heads_has_too_small_a_rank() -> None:
    A, X = problem()
    k, heads = 9, 3
    few = filters.mha(A, heads)
    wide = torch.zeros(heads, N + D, k * D, dtype=torch.float64)
    wide[:, :D] = random(torch.Generator().manual_seed(0), heads, D, k * D)
    out = sum(
        Layer(few.w_q[[h]], few.w_k[[h]], wide[[h]]).attend_linearly(tokens(X))[0]
        for h in range(heads)
    )
    target = filter_bank(A, X, k)
    assert torch.linalg.matrix_rank(out) == heads * D
    assert torch.linalg.matrix_rank(target) == k * D
    # No output of that rank is nearer than the measured distance; this is the nearest one.
    U, S, V = torch.linalg.svd(target, full_matrices=False)
    nearest = U[:, : heads * D] * S[: heads * D] @ V[: heads * D]
    distance = float((target - nearest).norm() / target.norm())
    assert filters.distance_from_rank(target, heads * D) == pytest.approx(distance)
    assert filters.distance_from_rank(target, k * D) < EXACT


def test_the_softmax_form_nears_the_linear_one_as_epsilon_squared() -> None:
    coarse, fine = filters.limit_errors([1e-2, 1e-3])
    assert fine < 1e-6
    assert coarse / fine == pytest.approx(100, rel=0.02)


def test_softmax_needs_both_signs() -> None:
    """With keys and values of one sign, the mean of the values drowns the filter."""
    A, X = problem()
    right, target = filters.near_linear(filters.iha(A, 2), 1e-3), filter_bank(A, X, 4)
    assert right.mixing is not None
    single = right.mixing._replace(
        **{name: getattr(right.mixing, name)[..., :2] for name in right.mixing._fields}
    )
    single = dataclasses.replace(right, mixing=single)
    assert block_error(right.attend(tokens(X), scale=1e-3), target) < 1e-6
    assert block_error(single.attend(tokens(X), scale=1e-3), target) > 1


def test_parameters_of_k_equal_4_by_hand() -> None:
    (count,) = filters.parameter_counts([4])
    # N = 64, d = 2. MHA, 4 heads: W_Q, W_K 66×64, W_V 66×2.
    assert count.mha == count.mha_formula == 4 * (2 * 66 * 64 + 66 * 2)
    # IHA, 2 heads: W_V 66×4; four mixing tensors 2×2×2.
    assert count.iha == count.iha_formula == 2 * (2 * 66 * 64 + 66 * 4) + 4 * 8
