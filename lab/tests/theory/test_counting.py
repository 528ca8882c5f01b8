"""CPM-3 against a triple loop, and the constructions that must fail."""

from __future__ import annotations

import itertools

import pytest
import torch

from iha_lab.theory import counting
from iha_lab.theory.counting import G, M, counts, iha, mha, mlp, wrong_counts


def test_everything_is_reproduced() -> None:
    found = counting.findings()
    assert len(found) == 5 * len(counting.LENGTHS)
    assert [finding.claim for finding in found if not finding.holds] == []


def test_counts_are_the_definition() -> None:
    x = counting.sequences(5)[::9]
    for sequence, counted in zip(x.tolist(), counts(x).tolist(), strict=True):
        for i, number in enumerate(counted):
            pairs = itertools.product(sequence, repeat=2)
            assert number == sum((sequence[i] + G * a + b) % M == 0 for a, b in pairs)


def test_order_matters_with_our_g_and_not_with_one_that_meets_the_papers_condition() -> None:
    def symmetric(g: int) -> bool:
        triples = itertools.product(range(M), repeat=3)
        return all(((i + g * a + b) % M == 0) == ((i + g * b + a) % M == 0) for i, a, b in triples)

    assert G > 2 * M
    assert not symmetric(G)
    assert symmetric(2 * M + 1)


@pytest.mark.parametrize("N", [2, 7, 9, 12])
def test_both_constructions_count_right(N: int) -> None:
    x = counting.sequences(N)
    assert wrong_counts(iha(N), x, counts(x)) == 0
    assert wrong_counts(mha(N, N), x, counts(x)) == 0


def test_every_sequence_of_four_residues() -> None:
    x = torch.tensor(list(itertools.product(range(M), repeat=4)))
    layer = iha(4)
    assert layer.w_q.shape[0] == 2
    assert wrong_counts(layer, x, counts(x)) == 0


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_wrong_shift_counts_wrong(step: int) -> None:
    x = counting.sequences(9)
    assert wrong_counts(iha(9, step=3), x, counts(x)) == 0
    assert wrong_counts(iha(9, step=step), x, counts(x)) > 100


@pytest.mark.parametrize("heads", [3, 8])
def test_mha_with_a_head_too_few_counts_wrong(heads: int) -> None:
    x = counting.sequences(9)
    assert wrong_counts(mha(9, heads), x, counts(x)) > 100


def test_attention_has_to_be_hard(monkeypatch: pytest.MonkeyPatch) -> None:
    x = counting.sequences(9)
    monkeypatch.setattr(counting, "HARD", 1.0)
    assert wrong_counts(iha(9), x, counts(x)) > 100


def test_the_papers_example_brings_all_symbols_to_every_token() -> None:
    held = counting.workspace(iha(4), torch.tensor([[1, 2, 3, 4]])).round()
    assert held.tolist() == [[[1, 4, 3, 2], [2, 1, 4, 3], [3, 2, 1, 4], [4, 3, 2, 1]]]


def test_the_mlp_counts_whatever_the_order_of_the_others() -> None:
    x = counting.sequences(6)
    own, others = x.double()[:, :1], x.double()[:, 1:]
    orders = [others, others.flip(-1)]
    for order in orders:
        held = torch.cat((own, order), -1)[:, None]
        assert torch.equal(mlp(held, 6)[:, 0].long(), counts(x)[:, 0])
