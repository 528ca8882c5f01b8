"""The patterns are those of the definition, and their ranks can be other than P²."""

from __future__ import annotations

import pytest
import torch

from iha import HeadMixing
from iha_lab.theory import ranks as subject
from iha_lab.theory.layer import mixing_of, random
from iha_lab.theory.ranks import D, E, H, N, random_mixing, rank, ranks


def test_everything_is_reproduced() -> None:
    measured = [ranks(random_mixing(P)) for P in (1, 3, 5)]
    found = subject.findings(ranks(None), measured)
    assert len(found) == 2 + 3 * 3
    assert [finding.claim for finding in found if not finding.holds] == []


@pytest.mark.parametrize("linear", [False, True])
def test_patterns_are_the_definition(linear: bool) -> None:
    mixing = random_mixing(2)
    seeded = torch.Generator().manual_seed(0)
    x = random(seeded, N, E)
    Q, K = (x @ random(seeded, H, E, D) / E**0.5 for _ in range(2))
    seen = subject.patterns(mixing, linear=linear).unflatten(1, (2, 2))
    for h in range(H):
        scores = torch.zeros(2, 2, N, N, dtype=torch.float64)
        for p in range(2):
            for q in range(2):
                query = torch.einsum("m,mnd->nd", mixing.alpha_q[:, h, p], Q)
                key = torch.einsum("m,mnd->nd", mixing.alpha_k[:, h, q], K)
                scores[p, q] = query @ key.T
        expected = scores if linear else scores.exp() / scores.exp().sum((1, 3), keepdim=True)
        torch.testing.assert_close(seen[h], expected)


def test_equal_pseudo_heads_are_one_pattern() -> None:
    for P in (2, 4):
        mixing = mixing_of(
            HeadMixing(H, num_kv_heads=H, pseudo_heads=P, init="identity", dtype=torch.float64)
        )
        assert ranks(mixing).head == 1


def test_equal_pseudo_keys_are_one_pattern_a_query() -> None:
    mixing = random_mixing(3)
    mixing = mixing._replace(alpha_k=mixing.alpha_k[:, :, :1].expand(-1, -1, 3))
    assert ranks(mixing).head == 3


def test_softmax_makes_patterns_that_scores_have_not() -> None:
    P = H + 1
    found = ranks(random_mixing(P))
    assert found.head == P * P
    assert found.head_scores == H * H


def test_a_wrong_rank_is_not_reproduced() -> None:
    claimed = subject.Ranks(pseudo_heads=2, head=3, layer=16, head_scores=4)
    found = subject.findings(ranks(None), [claimed])
    assert [finding.claim for finding in found if not finding.holds] == [
        "an IHA head has P² = 4 patterns"
    ]


def test_rank_ignores_what_is_only_rounding() -> None:
    one, other = random(torch.Generator().manual_seed(0), 2, 3, 3)
    assert rank(torch.stack((one, 2 * one + 1e-15 * other))[None]) == 1
    assert rank(torch.stack((one, other))[None]) == 2
