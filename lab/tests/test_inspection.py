"""Numbers of the inspector on mixings whose answer is known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import iha
from iha_lab import inspection
from iha_lab.inspection import distances, effective_rank, inspect, talk, unread
from tests.hf.families import inputs, tiny, trained


def test_maps_that_are_apart_count_and_equal_ones_count_once() -> None:
    k, N = 4, 8
    apart = torch.zeros(1, N, 2, N, 2)  # map (p, q) has rows 2 (2p + q) and the next, alone
    for i in range(k):
        apart[0, 2 * i : 2 * i + 2, i // 2, :, i % 2] = 0.5
    assert effective_rank(apart) == pytest.approx(k)
    assert effective_rank(torch.full((1, N, 2, N, 2), 0.1)) == pytest.approx(1)
    assert effective_rank(apart[:, :, :1] + 0) == pytest.approx(2)


def test_an_exact_start_has_no_distance_and_a_moved_head_has_its_own() -> None:
    mixing = iha.HeadMixing(4, num_kv_heads=2, pseudo_heads=3, init="upcycle")
    assert distances(mixing).abs().max() < 1e-6
    with torch.no_grad():
        mixing.alpha_q[0, 1, -1] += 3
        mixing.alpha_q[0, 1, 0] += 9  # free
        mixing.alpha_k[:, 1] += 2  # six numbers, over √3
        mixing.alpha_v[0, 0] += 5
        mixing.alpha_v[1, 0, 0] += 1  # zero-sum
        mixing.alpha_v[1, 0, 1] -= 1
        mixing.collapse[2, 3, 0] -= 4
    expected = torch.zeros(4, 4)
    expected[1, 0], expected[2:, 1], expected[:2, 2], expected[3, 3] = 3, 8**0.5, 5, 4
    torch.testing.assert_close(distances(mixing).float(), expected)


@pytest.mark.parametrize("per_head", [False, True])
def test_start_talks_to_nobody(per_head: bool) -> None:
    mixing = iha.HeadMixing(4, pseudo_heads=2, per_head_collapse=per_head, init="upcycle")
    assert distances(mixing).abs().max() < 1e-6
    found = talk(mixing)
    for table in (found.queries, found.keys, found.values, found.outputs):
        torch.testing.assert_close(table.float(), torch.eye(4), atol=1e-6, rtol=0)
    assert found.strongest(1)[0][3] < 1e-6
    assert unread(mixing) == [(h, 0) for h in range(4)]


def test_who_listens_to_whom() -> None:
    mixing = iha.HeadMixing(4, num_kv_heads=2, pseudo_heads=2, value_noise=0, init="upcycle")
    with torch.no_grad():
        mixing.collapse[1, 3, -1] = -3  # output 1 takes three parts of head 3, one of its own
        mixing.alpha_k[0, 1] = 1  # group 1 hears group 0 as much as itself
    found = talk(mixing)
    assert found.outputs[1].tolist() == [0, 0.25, 0, 0.75]
    assert found.keys[1].tolist() == [0.5, 0.5]
    assert found.strongest(2) == [("outputs", 1, 3, 0.75), ("keys", 1, 0, 0.5)]


def test_fewer_pseudo_queries_are_numbered_from_the_last() -> None:
    mixing = iha.HeadMixing(2, pseudo_heads=4, pseudo_queries=2, init="upcycle")
    assert unread(mixing) == [(0, 2), (1, 2)]


def test_a_model_layer_by_layer() -> None:
    model: Any = trained("llama", 2, layers=[0, 2])
    with torch.no_grad():
        mixing = model.model.layers[0].self_attn.head_mixing
        mixing.collapse[:, 2, 0] = 0
    first, last = inspect(model, inputs("llama"))
    assert [first.name, last.name] == ["layers.0.self_attn", "layers.2.self_attn"]
    assert first.unread == [(2, 0)]
    assert last.unread == last.ignored == []
    assert all(1 <= rank <= 4 for rank in first.ranks + last.ranks)
    assert first.distances.shape == (4, 4)
    (chosen,) = inspect(model, inputs("llama"), [2])
    assert chosen.ranks == pytest.approx(last.ranks, rel=1e-5)
    with pytest.raises(ValueError, match=r"no layer with IHA; those are layers\.0\.self_attn"):
        next(inspect(model, inputs("llama"), [1]))
    with pytest.raises(ValueError, match="no mixing tensors"):
        next(inspect(tiny("llama"), inputs("llama")))


def test_a_pseudo_key_that_nobody_reads_is_named() -> None:
    model: Any = tiny("llama", num_key_value_heads=4)
    attention = model.model.layers[1].self_attn
    attention.k_proj.weight.data = attention.q_proj.weight.data  # a query likes its own key
    iha.upcycle(model, 2, causal="token", query_noise=0)
    assert next(inspect(model, inputs("llama"), [1])).ignored == []
    with torch.no_grad():
        attention.head_mixing.alpha_k[:, 2, 0] = 0
        attention.head_mixing.alpha_k[:, 2, 1] *= 50
    assert next(inspect(model, inputs("llama"), [1])).ignored == [(2, 0)]


def test_the_exact_start_is_the_plain_model() -> None:
    given = inputs("llama")
    plain, model = tiny("llama"), trained("llama", 2, per_head_collapse=True)
    with torch.no_grad():
        expected, moved = plain(**given).logits, model(**given).logits
        back = inspection.to_exact_start(copy.deepcopy(model))(**given).logits
    real = given["attention_mask"].bool()
    assert (moved - expected)[real].abs().max() > 0.1
    torch.testing.assert_close(back[real], expected[real], atol=1e-4, rtol=1e-4)
