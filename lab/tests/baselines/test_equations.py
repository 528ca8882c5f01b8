"""Each baseline against its paper's equations as loops, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from iha_lab import baselines
from iha_lab.baselines import local_global, simplicial
from iha_lab.baselines.baseline import Baseline, Inputs
from iha_lab.baselines.composable import Composable
from iha_lab.baselines.differential import Differential
from iha_lab.baselines.differential_v2 import DifferentialV2
from iha_lab.baselines.explicit import Explicit
from iha_lab.baselines.gated import Gated
from iha_lab.baselines.knocking_heads import KnockingHeads
from iha_lab.baselines.local_global import Window
from iha_lab.baselines.multi_token import MultiToken
from iha_lab.baselines.paired_heads import PairedHeads
from iha_lab.baselines.simplicial import Simplicial
from iha_lab.baselines.talking_heads import TalkingHeads
from lab.tests.baselines import equations
from lab.tests.baselines.models import away_from_the_start, llama

B, N, d, SCALE = 2, 5, 3, 0.4


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tensors(H: int, G: int, N: int = N, S: int = N) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(B, h, n, d).double() for h, n in ((H, N), (G, S), (G, S)))  # type: ignore[return-value]


def random_(baseline: Baseline) -> Baseline:
    """No parameter at its start, where much is an identity."""
    for parameter in baseline.requires_grad_(False).parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    return baseline.double()


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
    baseline: Any = random_(TalkingHeads(H, G, d))
    inputs = tensors(H, G)
    out = baseline(Inputs(*inputs, visible, causal, SCALE))
    close(
        out, equations.talking_heads(*inputs, sees, SCALE, baseline.of_logits, baseline.of_weights)
    )


@WAYS
@HEADS
def test_differential(way: str, H: int, G: int) -> None:
    causal, visible, sees = VISIBLE[way]
    baseline: Any = random_(Differential(H, G, d, layer_index=3))
    inputs = tensors(H, G)
    vectors = (baseline.lambda_q1, baseline.lambda_k1, baseline.lambda_q2, baseline.lambda_k2)
    out = baseline(Inputs(*inputs, visible, causal, SCALE))
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
    baseline = Simplicial(2, 1, d, in_features=7, windows=windows)
    inputs, second = tensors(2, 1), tensors(2, 1)[1:]
    out = baseline.attend(Inputs(*inputs, visible, causal, SCALE), *second)
    close(out, equations.simplicial(*inputs, *second, sees, SCALE, windows))


def test_simplicial_takes_second_keys_and_values_from_what_the_key_projection_reads() -> None:
    model = baselines.equip(
        llama(num_hidden_layers=1, hidden_size=12), baselines.SimplicialConfig(biases=True)
    )
    attention = away_from_the_start(model).requires_grad_(False).model.layers[0].self_attn.double()
    states, (query, key, value) = torch.randn(B, N, 12).double(), tensors(4, 2)
    attention.k_proj(states)
    inputs = Inputs(query, key, value, None, True, SCALE)
    out = attention.baseline(inputs)
    second = []
    for linear, constant in ((attention.baseline.key, 1 / d), (attention.baseline.value, 1)):
        heads = states @ linear.weight.T + constant
        second.append(heads.view(B, N, 2, d).transpose(1, 2))
    sees = VISIBLE["causal"][2]
    close(out, equations.simplicial(query, key, value, *second, sees, SCALE, None))


def test_simplicial_gradients_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = Simplicial(2, 2, d, in_features=7, windows=(3, 2))
    leaves = [tensor.requires_grad_() for tensor in (*tensors(2, 2), *tensors(2, 2)[1:])]
    inputs = Inputs(*leaves[:3], TRIANGLE[None, None], True, SCALE)
    found = []
    for chunk in (1, 2**24):
        monkeypatch.setattr(simplicial, "CHUNK", chunk)
        out: Any = baseline.attend(inputs, *leaves[3:])
        found.append(torch.autograd.grad(out.pow(2).sum(), leaves))
    assert all(gradient.abs().sum() > 0 for gradient in found[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("values", ["mlp", "linear"])
def test_knocking_heads(values: Any) -> None:
    baseline: Any = random_(KnockingHeads(4, 2, d, values))
    projected = torch.randn(B, N, 4 * d).double()
    for which in ("query", "value"):
        out = baseline.knock(projected, which)
        for b, n, h in torch.cartesian_prod(*map(torch.arange, (B, N, 4))).tolist():
            head = projected[b, n, h * d : (h + 1) * d]

            def times(matrix: Tensor, head: Tensor = head) -> Tensor:
                rows = [head[i] * matrix[i] for i in range(d)]
                return torch.stack(rows).sum(0)

            if which == "query":
                expected = times(baseline.t_q)
            elif values == "linear":
                expected = times(baseline.t_v)
            else:
                gate = 1 / (1 + (-times(baseline.w_gate)).exp())
                expected = 2 * times(baseline.w_down, times(baseline.w_up) * gate)
            close(out[b, n, h * d : (h + 1) * d], expected)
    inputs = tensors(4, 2)
    out = baseline(Inputs(*inputs, None, True, SCALE))
    close(out, equations.plain(*inputs, VISIBLE["causal"][2], SCALE))


@WAYS
@HEADS
@pytest.mark.parametrize("window", [1, 3, 9])
@pytest.mark.parametrize("block", [1, 2, 128])
def test_windows(
    way: str, H: int, G: int, window: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_global, "BLOCK", block)
    causal, visible, sees = VISIBLE[way]
    inputs = tensors(H, G)
    baseline = Window(H, G, d, window)
    out = baseline(Inputs(*inputs, visible, causal, SCALE))

    def near(b: int, n: int, s: int) -> bool:
        return sees(b, n, s) and abs(n - s) < window

    close(out, equations.plain(*inputs, near, SCALE))


@pytest.mark.parametrize("S", [N + 3, N + 1])
def test_windows_go_by_where_the_queries_stand(S: int) -> None:
    """As with a preallocated cache, whose last keys belong to no token yet."""
    query, key, value = tensors(4, 2, N=1, S=S)
    visible = (torch.arange(S) <= 3)[None, None, None]
    inputs = Inputs(query, key, value, visible, True, SCALE, torch.tensor(3))
    out = Window(4, 2, d, 2)(inputs)
    close(out, equations.plain(query, key, value, lambda b, n, s: s in (2, 3), SCALE))


@WAYS
@HEADS
def test_paired_heads(way: str, H: int, G: int) -> None:
    causal, visible, sees = VISIBLE[way]
    inputs = tensors(H, G)
    out = PairedHeads(H, G, d)(Inputs(*inputs, visible, causal, SCALE))
    close(out, equations.paired_heads(*inputs, sees, SCALE, causal))


@WAYS
@HEADS
def test_explicit(way: str, H: int, G: int) -> None:
    causal, visible, sees = VISIBLE[way]
    baseline: Any = random_(Explicit(H, G, d))
    inputs = tensors(H, G)
    out = baseline(Inputs(*inputs, visible, causal, SCALE))
    mixing = baseline.of_keys, baseline.of_values
    close(out, equations.explicit(*inputs, sees, SCALE, *mixing))


@WAYS
@HEADS
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (6, 5)])
@pytest.mark.parametrize("both_sides", [False, True])
def test_multi_token(way: str, H: int, G: int, kernel: tuple[int, int], both_sides: bool) -> None:
    causal, visible, sees = VISIBLE[way]
    baseline: Any = random_(MultiToken(H, G, d, kernel, both_sides))
    inputs = tensors(H, G)
    out = baseline(Inputs(*inputs, visible, causal, SCALE))
    gate = baseline.gate[:, 0], float(baseline.gate_bias)
    weights = baseline.kernels, baseline.mixing, baseline.norm
    close(out, equations.multi_token(*inputs, sees, SCALE, *weights, *gate))


@WAYS
@HEADS
def test_composable(way: str, H: int, G: int) -> None:
    causal, visible, sees = VISIBLE[way]
    baseline: Any = random_(Composable(H, G, d, in_features=7))
    inputs, states = tensors(H, G), torch.randn(B, N, 7).double()
    baseline.see(None, (states,), states)
    out = baseline(Inputs(*inputs, visible, causal, SCALE))
    weights = baseline.first.weight, baseline.second, baseline.gates.weight, baseline.base
    close(out, equations.composable(*inputs, sees, SCALE, states, *weights))


def test_composable_starts_near_plain_attention() -> None:
    baseline: Any = Composable(4, 2, d, in_features=7).double()
    inputs, states = tensors(4, 2), torch.randn(B, N, 7).double()
    baseline.see(None, (states,), states)
    out = baseline(Inputs(*inputs, None, True, SCALE))
    expected = equations.plain(*inputs, VISIBLE["causal"][2], SCALE)
    assert 0 < (out - expected).abs().max() < 0.05 * expected.abs().max()


@WAYS
@HEADS
@pytest.mark.parametrize("headwise", [True, False])
def test_gated(way: str, H: int, G: int, headwise: bool) -> None:
    causal, visible, sees = VISIBLE[way]
    baseline: Any = random_(Gated(H, G, d, 7, headwise))
    inputs, states = tensors(H, G), torch.randn(B, N, 7).double()
    baseline.see(None, (states,), states)
    out = baseline(Inputs(*inputs, visible, causal, SCALE))
    expected = equations.plain(*inputs, sees, SCALE)
    for b, h, n, l in torch.cartesian_prod(*map(torch.arange, (B, H, N, d))).tolist():
        row = baseline.gate.weight[h if headwise else h * d + l]
        expected[b, h, n, l] /= 1 + math.exp(-equations.dot(states[b, n], row))
    close(out, expected)


@WAYS
@HEADS
def test_differential_v2(way: str, H: int, G: int) -> None:
    causal, visible, sees = VISIBLE[way]
    baseline: Any = random_(DifferentialV2(H, G, d, 7, projection_bias=True))
    (query, key, value), states = tensors(H, G), torch.randn(B, N, 7).double()
    # The layer's own queries beside the new ones, as the projection then gives them.
    projected = baseline.see(None, (states,), query.transpose(1, 2).flatten(2))
    both = projected.view(B, N, 2 * H, d).transpose(1, 2)
    other = torch.zeros_like(query)
    for h, l in torch.cartesian_prod(torch.arange(H), torch.arange(d)).tolist():
        row, bias = baseline.query.weight[h * d + l], baseline.query.bias[h * d + l]
        other[:, h, :, l] = (states * row).sum(-1) + bias
    close(both, torch.stack([query, other], 2).flatten(1, 2))
    out = baseline(Inputs(both, key, value, visible, causal, SCALE))
    expected = equations.plain(query, key, value, sees, SCALE)
    subtracted = equations.plain(other, key, value, sees, SCALE)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, (B, H, N))).tolist():
        balance = 1 / (1 + math.exp(-equations.dot(states[b, n], baseline.balance.weight[h])))
        expected[b, h, n] -= balance * subtracted[b, h, n]
    close(out, expected)


def test_paired_heads_interleave_as_the_records_views_do() -> None:
    heads = torch.randn(B, 4, N, d)
    records = heads.transpose(1, 2).reshape(B, N, 2, 2 * d).view(B, 2 * N, 2, d)
    assert torch.equal(PairedHeads(4, 4, d).interleaved(heads), records.transpose(1, 2))


@pytest.mark.parametrize("visible", [None, torch.ones(1, 1, 1, N + 3, dtype=torch.bool)])
def test_paired_heads_of_the_last_token(visible: Tensor | None) -> None:
    inputs = tensors(4, 2, N=1, S=N + 3)
    out = PairedHeads(4, 2, d)(Inputs(*inputs, visible, True, SCALE))
    close(out, equations.paired_heads(*inputs, lambda b, n, s: True, SCALE, True))


@pytest.mark.parametrize("kind", [TalkingHeads, KnockingHeads])
@WAYS
def test_the_start_is_plain_attention_where_the_paper_says_so(kind: Any, way: str) -> None:
    causal, visible, sees = VISIBLE[way]
    baseline = kind(4, 2, d).double()
    inputs = tensors(4, 2)
    flat = torch.randn(B, N, 4 * d).double()
    if kind is KnockingHeads:
        for which in ("query", "key", "value"):
            assert torch.equal(baseline.knock(flat, which), flat)
    out = baseline(Inputs(*inputs, visible, causal, SCALE))
    close(out, equations.plain(*inputs, sees, SCALE))


@pytest.mark.parametrize("kind", [Differential, PairedHeads])
@pytest.mark.parametrize(("H", "G"), [(3, 3), (4, 1)])
def test_what_takes_heads_in_pairs_says_so(kind: Any, H: int, G: int) -> None:
    with pytest.raises(ValueError, match="even number"):
        kind(H, G, d)
