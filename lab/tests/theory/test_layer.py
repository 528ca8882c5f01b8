"""The theorems' layer against sums written out from the definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from iha_lab.theory.layer import Layer, Mixing, random, routers

N, E, H, G, P = 4, 5, 4, 2, 3


def example(n: int, m: int, mixed: bool) -> tuple[Layer, Tensor]:
    seeded = torch.Generator().manual_seed(n)
    weights = (random(seeded, H, E, n), random(seeded, G, E, n), random(seeded, G, E, m))
    sizes = (H, G, G, H)
    mixing = Mixing(*(random(seeded, size, size, P) for size in sizes)) if mixed else None
    return Layer(*weights, mixing=mixing), random(seeded, N, E)


def written_out(layer: Layer, x: Tensor, *, softmax: bool) -> Tensor:
    """[O_1, …, O_H] by loops over heads, pseudo-heads and tokens."""
    mixing = layer.mixing
    if mixing is None:
        one = [torch.eye(size, dtype=x.dtype)[..., None] for size in (H, G, G, H)]
        mixing = Mixing(*one)
    pseudo = mixing.alpha_q.shape[2]
    Q, K, V = ([x @ weight for weight in weights] for weights in (layer.w_q, layer.w_k, layer.w_v))

    def mixed(base: list[Tensor], alpha: Tensor, h: int, p: int) -> Tensor:
        return sum((alpha[m, h, p] * base[m] for m in range(len(base))), torch.zeros_like(base[0]))

    out = torch.zeros(H, N, layer.w_v.shape[-1], dtype=x.dtype)
    for h, p, n in itertools.product(range(H), range(pseudo), range(N)):
        g = h // (H // G)
        pairs = list(itertools.product(range(N), range(pseudo)))
        query = mixed(Q, mixing.alpha_q, h, p)[n]
        scores = torch.stack([query @ mixed(K, mixing.alpha_k, g, q)[s] for s, q in pairs])
        weights = scores.exp() / scores.exp().sum() if softmax else scores
        values = torch.stack([mixed(V, mixing.alpha_v, g, q)[s] for s, q in pairs])
        for target in range(H):
            out[target, n] += mixing.collapse[target, h, p] * (weights @ values)
    return torch.cat(list(out), -1)


@pytest.mark.parametrize("mixed", [True, False], ids=["IHA", "plain"])
@pytest.mark.parametrize(("n", "m"), [(3, 2), (2, 3)], ids=["narrow values", "wide values"])
def test_attention_is_the_definition(n: int, m: int, mixed: bool) -> None:
    layer, x = example(n, m, mixed)
    expected = written_out(layer, x, softmax=True)
    torch.testing.assert_close(layer.attend(x[None], scale=1.0)[0], expected)


@pytest.mark.parametrize("mixed", [True, False], ids=["IHA", "plain"])
@pytest.mark.parametrize(("n", "m"), [(3, 2), (2, 3)], ids=["narrow values", "wide values"])
def test_linear_attention_is_the_definition_without_softmax(n: int, m: int, mixed: bool) -> None:
    layer, x = example(n, m, mixed)
    expected = written_out(layer, x, softmax=False)
    torch.testing.assert_close(layer.attend_linearly(x[None])[0], expected)


def test_parameters_are_weights_and_mixing() -> None:
    weights = H * E * 3 + G * E * 3 + G * E * 2
    assert example(3, 2, mixed=False)[0].parameters() == weights
    mixing = 2 * H * H * P + 2 * G * G * P
    assert example(3, 2, mixed=True)[0].parameters() == weights + mixing


def test_routers_are_the_papers() -> None:
    r = 3
    for m, h, j in itertools.product(range(r), repeat=3):
        own, every = float(m == h and j == 0), float(m == j)
        entries = [float(tensor[m, h, j]) for tensor in routers(r)]
        assert entries == [own, every, every, own]
