"""Costs against counting: parameters one by one, FLOPs as PyTorch counts products."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForTokenClassification, LlamaForCausalLM

import iha
from iha_lab import baselines
from iha_lab.baselines.baseline import pairs
from iha_lab.baselines.composable import Composable
from iha_lab.baselines.differential import Differential
from iha_lab.baselines.differential_v2 import DifferentialV2
from iha_lab.baselines.explicit import Explicit
from iha_lab.baselines.gated import Gated
from iha_lab.baselines.knocking_heads import KnockingHeads
from iha_lab.baselines.local_global import Window
from iha_lab.baselines.multi_token import MultiToken
from iha_lab.baselines.simplicial import Simplicial
from iha_lab.baselines.talking_heads import TalkingHeads
from lab.tests.baselines.models import EVERY, bert, bert_config, llama, llama_config

EVERY_KIND = pytest.mark.parametrize("kind", EVERY)


def counted(model: Any, *arguments: Any) -> int:
    """Products of matrices in a forward pass, SDPA's too."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*arguments)
    return counter.get_total_flops()


@EVERY_KIND
@pytest.mark.parametrize("family", [llama, bert])
def test_parameters(kind: str, family: Any) -> None:
    plain, model = family(), baselines.equip(family(), EVERY[kind])
    found = baselines.cost(model, 16)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.extra_parameters == found.parameters - baselines.cost(plain, 16).parameters
    without = {"mha", "local-global", "paired-heads"}
    assert (found.extra_parameters == 0) == (kind in without)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        (Window(4, 2, 8, 3), 0),
        (TalkingHeads(4, 2, 8), 2 * 4**2),
        (Differential(4, 2, 8), 4 * 8),
        (KnockingHeads(4, 2, 8), 5 * 8**2),
        (KnockingHeads(4, 2, 8, "linear"), 3 * 8**2),
        (KnockingHeads(4, 2, 8, "mlp", False), 3 * 8**2),
        (Simplicial(4, 2, 8, 32, projection_bias=True), 2 * 2 * 8 * (32 + 1)),
        (Gated(4, 2, 8, 32), 32 * 4 * 8),
        (Gated(4, 2, 8, 32, headwise=True), 32 * 4),
        (DifferentialV2(4, 2, 8, 32, projection_bias=True), (32 + 1) * 4 * 8 + 32 * 4),
        (MultiToken(4, 2, 8), 4 * 6 * 11 + 4**2 + 8 + 8 + 1),
        (MultiToken(4, 2, 8, (2, 3), both_sides=True), 2 * (4 * 2 * 3 + 4**2) + 8 + 8 + 1),
        (Composable(4, 2, 8, 32), 32 * 4 * 16 + 4 * 16 * 4 * 4 + 32 * 4 * 4 + 2 * 4**2),
        (Explicit(4, 2, 8), 2 * 2**2),
    ],
)
def test_parameters_of_a_layer(baseline: Any, expected: int) -> None:
    assert sum(p.numel() for p in baseline.parameters()) == expected


@pytest.mark.parametrize(
    "kind",
    [
        *("mha", "paired-heads", "talking-heads", "knocking-heads", "knocking-heads-linear"),
        *("gated", "gated-headwise", "differential-v2", "mea", "multi-token", "multi-token-both"),
    ],
)
def test_flops_are_those_that_pytorch_counts(kind: str) -> None:
    """Of a bidirectional model, which computes every pair."""
    model = baselines.equip(bert(), EVERY[kind])
    inputs = torch.zeros(1, 16, dtype=torch.long)
    assert baselines.cost(model, 16).total_flops == counted(model, inputs)


def test_flops_of_2_simplicial_attention_are_those_that_pytorch_counts_and_products() -> None:
    model = baselines.equip(bert(), baselines.SimplicialConfig())
    found = baselines.cost(model, 16)
    # Of three operations a triple and feature, two are in products of matrices.
    matrices = found.attention_flops * 2 // 3
    expected = found.total_flops - found.attention_flops + matrices
    assert expected == counted(model, torch.zeros(1, 16, dtype=torch.long))
    assert found.attention_flops == 6 * 4 * 8 * 16**3


def test_flops_of_dcmha_are_those_that_pytorch_counts_and_gates() -> None:
    H, N = 4, 16
    model = baselines.equip(bert(), baselines.ComposableConfig())
    # The gates of queries and keys, of scores and weights, are no products of matrices.
    expected = baselines.cost(model, N).total_flops - 2 * 4 * H * N**2
    assert expected == counted(model, torch.zeros(1, N, dtype=torch.long))


def test_flops_of_differential_attention_are_those_of_its_definition() -> None:
    H, N, d = 4, 16, 8
    query, key, value = (torch.randn(1, H, N, d) for _ in range(3))

    def written_out() -> None:
        first, second = (query @ key.mT).softmax(-1).chunk(2, dim=1)
        (first - 0.3 * second) @ torch.cat(value.chunk(2, dim=1), -1)

    assert Differential(H, H, d).flops(N, causal=False) == counted(written_out)


@pytest.mark.parametrize("P", [1, 2])
def test_flops_of_iha_are_those_of_its_definition(P: int) -> None:
    H, N, d = 4, 16, 8
    query, key, value = (torch.randn(1, H, N, d) for _ in range(3))
    alpha = torch.randn(H, H, P)

    def written_out() -> None:
        q, k, v = (torch.einsum("bmnd,mhp->bhnpd", t, alpha) for t in (query, key, value))
        q, k, v = (t.flatten(2, 3) for t in (q, k, v))
        out = ((q @ k.mT).softmax(-1) @ v).unflatten(2, (N, P))
        torch.einsum("bhnpd,ghp->bgnd", out, alpha)

    attention = baselines.InterleavedConfig(pseudo_heads=P, rope="token")
    full = counted(written_out)
    assert baselines.cost(baselines.equip(bert(), attention), N).attention_flops == full
    per_head = attention.model_copy(update={"collapse": "per-head"})
    # One number for each pseudo-head in place of a map between all heads.
    less = 2 * N * d * P * (H**2 - H)
    assert baselines.cost(baselines.equip(bert(), per_head), N).attention_flops == full - less


def test_flops_of_causal_iha_are_its_own() -> None:
    N, P = 64, 2
    model = baselines.equip(llama(), baselines.InterleavedConfig(pseudo_heads=P))
    expected = 2 * iha.attention_flops(N, 4, 8, P, num_kv_heads=2)
    assert baselines.cost(model, N).attention_flops == expected
    attention = baselines.InterleavedConfig(pseudo_heads=P, schedule=True)
    model = baselines.equip(llama(num_hidden_layers=5), attention, N)
    schedule = iha.hybrid_schedule(5, N, P)
    assert baselines.cost(model, N).attention_flops == schedule.flops(4, 8, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 4, 500])
def test_visible_pairs(causal: bool, window: int | None) -> None:
    N = 400
    exact = sum(
        (s <= n or not causal) and (window is None or abs(n - s) < window)
        for n in range(N)
        for s in range(N)
    )
    assert pairs(N, causal, window) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("windows", [None, (8, 3)])
def test_visible_triples(causal: bool, windows: tuple[int, int] | None) -> None:
    N = 500
    n = torch.arange(N)[:, None]
    sees = (n >= n.T) | torch.tensor(not causal)
    counts = [(sees & ((n - n.T).abs() < w)).sum(1) for w in windows or (N, N)]
    exact = int((counts[0] * counts[1]).sum())
    flops = Simplicial(1, 1, 1, 1, windows).flops(N, causal)
    assert flops / 6 == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("P", [1, 2])
def test_a_window_of_the_models_own_is_counted(P: int) -> None:
    model = llama()
    if P > 1:
        baselines.equip(model, baselines.InterleavedConfig(pseudo_heads=P))
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 4
    expected = 2 * iha.attention_flops(64, 4, 8, P, num_kv_heads=2, window=4)
    assert baselines.cost(model, 64).attention_flops == expected


@EVERY_KIND
def test_on_the_meta_device(kind: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config())
    model = baselines.equip(model, EVERY[kind])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert baselines.cost(model, 32) == baselines.cost(baselines.equip(llama(), EVERY[kind]), 32)


@EVERY_KIND
@pytest.mark.parametrize("by", ["parameters", "flops"])
@pytest.mark.parametrize(
    ("make", "config"),
    [
        (LlamaForCausalLM, llama_config(hidden_size=128, intermediate_size=512)),
        (BertForTokenClassification, bert_config(hidden_size=64, intermediate_size=1024)),
    ],
)
def test_matched(make: Any, config: Any, by: Any, kind: str) -> None:
    """As the model that is then really built counts, and better than its neighbours."""
    name = "parameters" if by == "parameters" else "total_flops"
    plain, before = getattr(baselines.cost(make(config), 16), name), config.to_dict()

    def off_at(width: int) -> float:
        other = copy.deepcopy(config)
        other.intermediate_size = width
        return (
            getattr(baselines.cost(baselines.equip(make(other), EVERY[kind]), 16), name) / plain - 1
        )

    changed, off = baselines.matched(make, config, EVERY[kind], 16, by)
    width = changed.intermediate_size
    assert config.to_dict() == before
    assert off_at(width) == off
    assert abs(off) < 0.01
    assert abs(off) < min(abs(off_at(width - 1)), abs(off_at(width + 1))) + 1e-12


def test_what_no_width_can_match_is_refused() -> None:
    with pytest.raises(ValueError, match="2-simplicial has more flops"):
        baselines.matched(
            LlamaForCausalLM, llama_config(), baselines.SimplicialConfig(), 512, "flops"
        )
