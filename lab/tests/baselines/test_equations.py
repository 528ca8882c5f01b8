"""Each rival against its paper's equations as loops, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from iha_lab.baselines import rival as interface
from iha_lab.baselines import simplicial
from iha_lab.baselines.differential import Differential
from iha_lab.baselines.knocking_heads import KnockingHeads
from iha_lab.baselines.local_global import Window
from iha_lab.baselines.rival import Rival
from iha_lab.baselines.simplicial import Simplicial
from iha_lab.baselines.talking_heads import TalkingHeads
from lab.tests.baselines import equations

B, N, d, SCALE = 2, 5, 3, 0.4


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tensors(H: int, G: int, N: int = N, S: int = N) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(B, h, n, d).double() for h, n in ((H, N), (G, S), (G, S)))  # type: ignore[return-value]


def random_(rival: Rival) -> Rival:
    """No parameter at its start, where much is an identity."""
    for parameter in rival.requires_grad_(False).parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    return rival.double()


# What is visible: (causal, a mask as transformers gives it, or None, the same as a function).
FIRST = (0, 2)  # in which token each sequence begins: the second has two tokens of padding
PADDING = torch.arange(N)[None] >= torch.tensor(FIRST)[:, None]
TRIANGLE = torch.ones(N, N, dtype=torch.bool).tril()
VISIBLE: dict[str, tuple[bool, Tensor | None, equations.Sees]] = {
    "causal": (True, None, lambda b, n, s: s <= n),
    "bidirectional": (False, None, lambda b, n, s: True),
    "causal, padded": (
        True,
        PADDING[:, None, None] & TRIANGLE,
        lambda b, n, s: FIRST[b] <= s <= n,
    ),
    "bidirectional, padded": (
        False,
        PADDING[:, None, None].expand(B, 1, N, N),
        lambda b, n, s: s >= FIRST[b],
    ),
}
WAYS = pytest.mark.parametrize("way", VISIBLE)
HEADS = pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2)])


def close(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


@WAYS
@HEADS
def test_talking_heads(way: str, H: int, G: int) -> None:
    causal, visible, sees = VISIBLE[way]
    rival: Any = random_(TalkingHeads(H, G, d))
    inputs = tensors(H, G)
    out = rival(*inputs, visible=visible, causal=causal, scale=SCALE)
    close(out, equations.talking_heads(*inputs, sees, SCALE, rival.of_logits, rival.of_weights))


@WAYS
@HEADS
def test_differential(way: str, H: int, G: int) -> None:
    causal, visible, sees = VISIBLE[way]
    rival: Any = random_(Differential(H, G, d, layer_index=3))
    inputs = tensors(H, G)
    vectors = (rival.lambda_q1, rival.lambda_k1, rival.lambda_q2, rival.lambda_k2)
    out = rival(*inputs, visible=visible, causal=causal, scale=SCALE)
    expected = equations.differential(*inputs, sees, SCALE, vectors, layer=3)
    # λ is computed in float32, as in DiffLlama.
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@WAYS
@pytest.mark.parametrize("windows", [None, (2, 3), (4, 1), (9, 2)])
@pytest.mark.parametrize("chunk", [1, 200, 2**24])
def test_simplicial(
    way: str, windows: tuple[int, int] | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simplicial, "CHUNK", chunk)
    causal, visible, sees = VISIBLE[way]
    rival = Simplicial(2, 1, d, in_features=7, windows=windows)
    inputs = (*tensors(2, 1), *tensors(2, 1)[1:])
    seen = interface.seen(N, N, causal, torch.device("cpu"))[None, None]
    out = rival.attend(*inputs, seen if visible is None else visible, causal, SCALE)
    close(out, equations.simplicial(*inputs, sees, SCALE, windows))


def test_simplicial_takes_second_keys_and_values_from_what_it_saw() -> None:
    rival: Any = random_(Simplicial(4, 2, d, in_features=7, biases=True, projection_bias=True))
    states, (query, key, value) = torch.randn(B, N, 7).double(), tensors(4, 2)
    rival._project(None, (states,), None)
    out = rival(query, key, value, visible=None, causal=True, scale=SCALE)
    second = []
    for linear, constant in ((rival.key, 1 / d), (rival.value, 1)):
        heads = states @ linear.weight.T + linear.bias + constant
        second.append(heads.view(B, N, 2, d).transpose(1, 2))
    sees = VISIBLE["causal"][2]
    close(out, equations.simplicial(query, key, value, *second, sees, SCALE, None))
    with pytest.raises(ValueError, match="use_cache=False"):
        rival(query, key, value, visible=None, causal=True, scale=SCALE)


def test_simplicial_gradients_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rival = Simplicial(2, 2, d, in_features=7, windows=(3, 2))
    inputs = [tensor.requires_grad_() for tensor in (*tensors(2, 2), *tensors(2, 2)[1:])]
    visible = TRIANGLE[None, None]
    found = []
    for chunk in (1, 2**24):
        monkeypatch.setattr(simplicial, "CHUNK", chunk)
        out: Any = rival.attend(*inputs, visible, True, SCALE)
        found.append(torch.autograd.grad(out.pow(2).sum(), inputs))
    assert all(gradient.abs().sum() > 0 for gradient in found[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("values", ["mlp", "linear"])
def test_knocking_heads(values: Any) -> None:
    rival: Any = random_(KnockingHeads(4, 2, d, values))
    projected = torch.randn(B, N, 4 * d).double()
    for which, hook in (("query", rival._knock_queries), ("value", rival._knock_values)):
        out = hook(None, None, projected)
        for b, n, h in torch.cartesian_prod(*map(torch.arange, (B, N, 4))).tolist():
            head = projected[b, n, h * d : (h + 1) * d]

            def times(matrix: Tensor, head: Tensor = head) -> Tensor:
                rows = [head[i] * matrix[i] for i in range(d)]
                return torch.stack(rows).sum(0)

            if which == "query":
                expected = times(rival.t_q)
            elif values == "linear":
                expected = times(rival.t_v)
            else:
                gate = 1 / (1 + (-times(rival.w_gate)).exp())
                expected = 2 * times(rival.w_down, times(rival.w_up) * gate)
            close(out[b, n, h * d : (h + 1) * d], expected)
    close(
        rival._knock_keys(None, None, projected),
        rival.knock(projected.view(B, N, 4, d), "key").flatten(-2),
    )
    inputs = tensors(4, 2)
    out = rival(*inputs, visible=None, causal=True, scale=SCALE)
    close(out, equations.plain(*inputs, VISIBLE["causal"][2], SCALE))


@WAYS
@HEADS
@pytest.mark.parametrize("window", [1, 3, 9])
def test_windows(way: str, H: int, G: int, window: int) -> None:
    causal, visible, sees = VISIBLE[way]
    inputs = tensors(H, G)
    rival = Window(H, G, d, window)
    out = rival(*inputs, visible=visible, causal=causal, scale=SCALE)

    def near(b: int, n: int, s: int) -> bool:
        return sees(b, n, s) and abs(n - s) < window

    close(out, equations.plain(*inputs, near, SCALE))


@pytest.mark.parametrize("S", [N + 3, N + 1])
def test_windows_go_by_where_the_queries_stand(S: int) -> None:
    """As with a preallocated cache, whose last keys belong to no token yet."""
    query, key, value = tensors(4, 2, N=1, S=S)
    visible = (torch.arange(S) <= 3)[None, None, None]
    out = Window(4, 2, d, 2)(
        query, key, value, visible=visible, causal=True, scale=SCALE, offset=torch.tensor(3)
    )
    close(out, equations.plain(query, key, value, lambda b, n, s: s in (2, 3), SCALE))


@pytest.mark.parametrize("kind", [TalkingHeads, KnockingHeads])
@WAYS
def test_the_start_is_plain_attention_where_the_paper_says_so(kind: Any, way: str) -> None:
    causal, visible, sees = VISIBLE[way]
    rival = kind(4, 2, d).double()
    inputs = tensors(4, 2)
    if kind is KnockingHeads:
        for which in ("query", "key", "value"):
            assert torch.equal(rival.knock(inputs[0], which), inputs[0])
    out = rival(*inputs, visible=visible, causal=causal, scale=SCALE)
    close(out, equations.plain(*inputs, sees, SCALE))


@pytest.mark.parametrize(("H", "G"), [(3, 3), (4, 1)])
def test_differential_attention_takes_heads_in_pairs(H: int, G: int) -> None:
    with pytest.raises(ValueError, match="even number"):
        Differential(H, G, d)
