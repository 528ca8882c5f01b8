"""Ways of generating that need more of a cache than one pass forwards, with trained models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.hf.families import inputs, tiny, trained

FAMILIES = ("llama", "mistral", "qwen3")


def generate(model: Any, given: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(**given, **settings)


def greedy(model: Any, given: dict[str, torch.Tensor], tokens: int = 12) -> torch.Tensor:
    """Without a cache and without `generate`: each token from a pass over all before it."""
    ids, mask = given["input_ids"], given["attention_mask"]
    for _ in range(tokens):
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_changes_nothing(family: str) -> None:
    model, given = trained(family), inputs(family)
    expected = greedy(model, given)
    assert torch.equal(generate(model, given), expected)
    assert torch.equal(generate(model, given, cache_implementation="static"), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted_decoding_is_greedy_decoding(family: str, how: str) -> None:
    """Candidates are checked several tokens at a time, and the cache is cut where they fail."""
    model, given = trained(family), inputs(family, batch=1)
    settings: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if how == "assistant":
        settings = {"assistant_model": tiny(family)}
    assert torch.equal(generate(model, given, **settings), greedy(model, given))


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_find_the_same_with_and_without_a_cache(family: str) -> None:
    model, given = trained(family), inputs(family)
    found = [
        generate(model, given, num_beams=3, num_return_sequences=2, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_is_kept_over_turns(family: str) -> None:
    """Each turn's prompt is what came before and a few tokens more, as in a chat."""
    model, cache = trained(family), DynamicCache(config=tiny(family).config)
    given = inputs(family, batch=1)
    for turn in range(3):
        whole = generate(model, given)
        assert torch.equal(generate(model, given, past_key_values=cache), whole)
        more = inputs(family, batch=1, tokens=5, seed=turn + 2)["input_ids"]
        ids = torch.cat((whole, more), 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_is_cached_once_for_several_prompts(family: str) -> None:
    model, cache = trained(family), DynamicCache(config=tiny(family).config)
    prefix = inputs(family, batch=1)["input_ids"]
    with torch.no_grad():
        model(input_ids=prefix, past_key_values=cache)
    for seed in (5, 6):
        more = inputs(family, batch=1, tokens=4, seed=seed)["input_ids"]
        ids = torch.cat((prefix, more), 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = generate(model, given, past_key_values=copy.deepcopy(cache))
        assert torch.equal(found, greedy(model, given))
