"""On repeated tokens MHA is linear; IHA need not be."""

from __future__ import annotations

import math

import pytest
import torch

from iha.call import Causality
from iha_lab.theory import strictness
from iha_lab.theory.layer import Layer, random
from iha_lab.theory.strictness import LINEAR, NONLINEAR, layer, nonlinearity, one, signs

CAUSALITIES = [None, "flat", "token"]


def test_all_but_the_printed_parameters_are_reproduced() -> None:
    found = strictness.findings()
    failed = [finding for finding in found if not finding.holds]
    assert len(found) == 10
    assert len(failed) == 2
    for finding in failed:
        assert "as printed in B.1" in finding.claim
        assert finding.measured < LINEAR


@pytest.mark.parametrize("causal", CAUSALITIES)
def test_linear_or_not(causal: Causality | None) -> None:
    assert nonlinearity(layer(None, 3), causal) < LINEAR
    assert nonlinearity(layer(one(3), 3), causal) < LINEAR
    assert nonlinearity(layer(signs(3, 1.0), 3), causal) < LINEAR
    assert nonlinearity(layer(signs(3, -1.0), 3), causal) > NONLINEAR


def test_mha_is_not_linear_where_tokens_differ() -> None:
    x, y = random(torch.Generator().manual_seed(0), 2, 1, strictness.N, strictness.E)
    plain = layer(None, 0)
    both, first, second = (plain.attend(tokens) for tokens in (x + y, x, y))
    assert (both - first - second).abs().max() > NONLINEAR


@pytest.mark.parametrize("selected", ["first", "last"])
@pytest.mark.parametrize("x", [-1.3, 0.4, 2.0])
def test_the_softmax_written_out(x: float, selected: str) -> None:
    """Under flat causality, by hand: keys +x then -x, values likewise, scores ±x²."""
    weight = torch.ones(1, 1, 1, dtype=torch.float64)
    mixing = signs(1, -1.0)
    if selected == "first":
        mixing = mixing._replace(collapse=mixing.collapse.flip(-1))
    tokens = torch.full((1, 3, 1), x, dtype=torch.float64)
    out = Layer(weight, weight, weight, mixing).attend(tokens, causal="flat", scale=1.0)
    for n in range(3):
        query = x if selected == "last" else -x
        plus, minus = n + 1, n + 1 if selected == "last" else n
        total = plus * math.exp(query * x) + minus * math.exp(-query * x)
        expected = x * (plus * math.exp(query * x) - minus * math.exp(-query * x)) / total
        assert float(out[0, n, 0]) == pytest.approx(expected, rel=1e-12)
        if selected == "last":
            assert expected == pytest.approx(math.tanh(x * x) * x, rel=1e-12)


def test_curves_are_a_line_and_a_tanh() -> None:
    curves = strictness.curves()
    torch.testing.assert_close(curves.mha, curves.x)
    torch.testing.assert_close(curves.printed, curves.x)
    expected = [math.tanh(x * x) * x for x in curves.x.tolist()]
    torch.testing.assert_close(curves.iha, torch.tensor(expected, dtype=torch.float64))
