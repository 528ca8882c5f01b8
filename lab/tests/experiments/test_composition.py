from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from iha_lab.data.examples import NO_LOSS
from iha_lab.experiments import composition, parse
from iha_lab.experiments.composition import PADDING, CompositionRun, Matrices, Relation, compose
from lab.tests.experiments.test_runner import TINY


@pytest.mark.parametrize("factors", [2, 3, 4])
def test_composition_is_the_existence_of_a_path(factors: int) -> None:
    torch.manual_seed(factors)
    relation = torch.rand(5, 5) < 0.3
    expected = torch.zeros(5, 5, dtype=torch.bool)
    for path in itertools.product(range(5), repeat=factors + 1):
        if all(relation[a, b] for a, b in itertools.pairwise(path)):
            expected[path[0], path[-1]] = True
    assert torch.equal(compose(relation, factors), expected)


def test_entries_keep_their_place_whatever_the_size_and_only_they_count() -> None:
    relation = Relation(factors=2, sizes=(3, 5), density=0.4)
    found = Matrices(relation, 60, "x")
    assert len(found) == 60
    sizes = set()
    for i in range(60):
        tokens, labels = found.tokens[i], found.labels[i]
        m = int((tokens[0] != PADDING).sum())
        sizes.add(m)
        assert (tokens[:m, :m] != PADDING).all()
        assert int((tokens != PADDING).sum()) == m * m
        assert torch.equal(labels[:m, :m].bool(), compose(tokens[:m, :m].bool(), 2))
        assert torch.equal(labels == NO_LOSS, tokens == PADDING)
        item = found[i]
        assert torch.equal(item["attention_mask"].bool(), item["input_ids"] != PADDING)
    assert sizes == {3, 4, 5}
    assert torch.equal(Matrices(relation, 60, "x").tokens, found.tokens)
    assert not torch.equal(Matrices(relation, 60, "y").tokens, found.tokens)


def test_the_papers_relations_are_balanced() -> None:
    """Why it chose these densities: always guessing one answer is little better than a coin."""
    for factors, sizes, density in ((2, (6, 10), 0.325), (3, (5, 8), 0.264)):
        labels = Matrices(Relation(factors=factors, sizes=sizes, density=density), 400, "b").labels
        ones = float((labels == 1).sum() / (labels != NO_LOSS).sum())
        assert 0.35 < ones < 0.65, (factors, ones)


def test_the_loss_and_accuracies_leave_padding_out() -> None:
    labels = torch.tensor([[1, 0, NO_LOSS], [0, NO_LOSS, NO_LOSS]])
    logits = torch.tensor([[2.0, 1.0, 9.0], [-3.0, 5.0, -5.0]])[..., None]
    expected = torch.nn.functional.softplus(torch.tensor([-2.0, 1.0, -3.0])).mean()
    loss = composition.loss({"logits": logits}, labels)
    torch.testing.assert_close(loss, expected)

    class Prediction:
        predictions, label_ids = logits.numpy(), labels.numpy()

    assert composition.accuracies(Prediction()) == {
        "accuracy": pytest.approx(2 / 3),
        "whole matrices": 0.5,
    }


def test_accuracy_over_entries_and_over_whole_matrices() -> None:
    matrices = Matrices(Relation(factors=2, sizes=(2, 3), density=0.4), 7, "t")

    class Oracle:
        """Knows all, but is wrong in the first entry of the first matrix."""

        device = torch.device("cpu")

        def __call__(self, tokens: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            logits = matrices.labels.flatten(1).float() - 0.5
            logits[0, 0] *= -1

            class Output:
                pass

            output = Output()
            output.logits = logits[..., None]  # type: ignore[attr-defined]
            return output

    entries = int((matrices.labels != NO_LOSS).sum())
    measured = composition.test(Oracle(), matrices, 7)
    assert measured == {"accuracy": 1 - 1 / entries, "whole matrices": 6 / 7}


def test_all_models_of_a_seed_start_alike() -> None:
    first, second = (parse(TINY).runs()[i] for i in (0, 2))
    assert isinstance(first, CompositionRun)
    assert isinstance(second, CompositionRun)
    one, other = first.model().state_dict(), second.model().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("by", ["parameters", "flops"])
def test_matched_attentions_cost_the_same(by: str) -> None:
    from iha_lab import baselines

    costs: dict[str, float] = {}
    for run in parse(TINY | {"match": by, "hidden_size": 64}).runs()[::2]:
        assert isinstance(run, CompositionRun)
        cost = baselines.cost(baselines.equip(run.model(), run.attention), 9)
        costs[run.attention.label] = cost.parameters if by == "parameters" else cost.total_flops
    assert costs["iha-p2-token"] == pytest.approx(costs["mha"], rel=0.01)
