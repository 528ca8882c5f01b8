"""MHA ⊆ IHA; and what each condition of the construction is for."""

from __future__ import annotations

import pytest
import torch

from iha.call import Causality
from iha_lab.theory import inclusion
from iha_lab.theory.inclusion import EXACT, MASKS, H, error, select, token_mask, upcycled


def test_all_but_the_papers_choice_under_a_causal_mask_is_reproduced() -> None:
    found = inclusion.findings()
    assert len(found) == 2 + 2 * len(MASKS)
    (failed,) = [finding for finding in found if not finding.holds]
    assert "Algorithm 1's causal mask" in failed.claim
    assert failed.measured > 0.1
    assert "no mask" in failed.remark


@pytest.mark.parametrize("pseudo_heads", [2, 3])
def test_the_first_pseudo_head_needs_a_mask_that_shows_it_all_copies(pseudo_heads: int) -> None:
    first, last = (select(pseudo_heads, first=first) for first in (True, False))
    for causal in ("token", None):
        assert error(first, causal, None) < EXACT
    assert error(first, "flat", None) > 0.1
    assert error(last, "flat", None) < EXACT
    assert error(select(1, first=True), "flat", None) < EXACT  # one copy: first is last


@pytest.mark.parametrize(("causal", "window"), MASKS.values(), ids=list(MASKS))
def test_no_condition_can_be_dropped(causal: Causality | None, window: int | None) -> None:
    mixing = upcycled(3, H)
    assert error(mixing, causal, window) < EXACT
    unbalanced, unequal = mixing.alpha_v.clone(), mixing.alpha_k.clone()
    unbalanced[:, :, 1] += 0.1 * torch.eye(H)  # ε no longer sums to zero
    unequal[:, :, 1] *= 1.5  # a key that is no replica takes more weight from the others
    other = mixing.collapse.roll(1, -1)  # selects a free pseudo-query
    for broken in (
        mixing._replace(alpha_v=unbalanced),
        mixing._replace(alpha_k=unequal),
        mixing._replace(collapse=other),
    ):
        assert error(broken, causal, window) > 1e-2


def test_the_mixing_is_not_the_identity() -> None:
    mixing = upcycled(3, H)
    assert (mixing.alpha_v - torch.eye(H)[..., None]).abs().max() > 0.5
    assert (mixing.alpha_q[..., 0] - torch.eye(H)).abs().max() > 0.5


def test_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    upcycled(2, H)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("causal", "window"), MASKS.values(), ids=list(MASKS))
def test_token_mask(causal: Causality | None, window: int | None) -> None:
    mask = token_mask(causal, window)
    for n in range(inclusion.N):
        for s in range(inclusion.N):
            near = window is None or abs(n - s) < window
            assert bool(mask[n, s]) == (near and (causal is None or s <= n))
