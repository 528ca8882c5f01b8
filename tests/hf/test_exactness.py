"""An upcycled model computes the function of the original: every family, every kind of cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, Gemma3Config, Gemma3ForConditionalGeneration

import iha
from tests.hf.families import DECODER, DECODERS, MORE, OTHERS, inputs, tiny

NOISE = {"value_noise": 1.0, "query_noise": 1.0}


def pair(family: str, pseudo_heads: int = 3, **settings: Any) -> tuple[Any, Any]:
    """The original, and the upcycled model with large random free parts."""
    # SDPA leaves Gemma 2's soft-cap out, so its own truth is the eager function.
    return tiny(family), iha.upcycle(tiny(family), pseudo_heads, **{**NOISE, **settings})


@torch.no_grad()
def logits(model: Any, given: dict[str, Any]) -> torch.Tensor:
    """The logits at tokens that are not padding."""
    found = model(**given).logits
    mask = given.get("attention_mask")
    return found if mask is None or mask.shape != found.shape[:2] else found[mask.bool()]


@pytest.mark.parametrize("causal", ["flat", "token"])
@pytest.mark.parametrize("family", [*DECODERS, *OTHERS])
def test_logits_are_the_originals(family: str, causal: Any) -> None:
    original, model = pair(family, causal=causal)
    given = inputs(family)
    expected = logits(original, given)
    assert expected.std() > 0.2  # nothing here is near zero
    torch.testing.assert_close(logits(model, given), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", MORE)
def test_logits_of_more_families(family: str) -> None:
    original, model = pair(family)
    given = inputs(family)
    expected = logits(original, given)
    assert expected.std() > 0.2
    torch.testing.assert_close(logits(model, given), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_start_that_ports_use_is_not_exact(family: str) -> None:
    """So the test above can fail: identity mixing and the mean differ under flat causality."""
    original, model = pair(family, init="identity")
    given = inputs(family)
    assert (logits(model, given) - logits(original, given)).abs().max() > 0.05


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_generation_is_the_originals(family: str, cache: str) -> None:
    """A batch with left padding, past the sliding windows."""
    original, model = pair(family)
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    options |= {"cache_implementation": cache, "return_dict_in_generate": True}
    given = inputs(family)
    expected, found = (
        m.generate(**given, **options, output_logits=True) for m in (original, model)
    )
    assert torch.equal(found.sequences, expected.sequences)
    for step, expected_step in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(step, expected_step, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["bart", "whisper"])
def test_encoder_decoders_generate_what_the_original_does(family: str) -> None:
    original, model = pair(family)
    given = {k: v for k, v in inputs(family).items() if k != "decoder_input_ids"}
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(**given, **options), original.generate(**given, **options))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_compiled_decoding_generates_what_the_original_does(family: str) -> None:
    """The whole graph, compiled once or twice and not again at every step."""
    original, model = pair(family)
    given, options = inputs(family), {"max_new_tokens": 10, "do_sample": False}
    expected = original.generate(**given, **options)
    compilation = CompileConfig(fullgraph=True, mode=None)
    compilation._compile_all_devices = True  # transformers compiles on a GPU only, otherwise
    torch.compiler.reset()
    counters["stats"].clear()
    found = model.generate(
        **given, **options, cache_implementation="static", compile_config=compilation
    )
    assert torch.equal(found, expected)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


def with_image(seed: int = 0) -> Any:
    """Gemma 3 with its vision tower: the tokens of an image see each other, later ones too."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Gemma3Config(
        text_config={**DECODER, **DECODERS["gemma3"][1]},
        vision_config={**tower, "num_attention_heads": 4, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=98,
    )
    return Gemma3ForConditionalGeneration(config).eval()


@torch.no_grad()
def test_the_tokens_of_an_image_see_each_other() -> None:
    """Under token causality the model's own mask holds, and under flat causality it is refused."""
    ids = torch.cat((torch.full((2, 3), 7), torch.full((2, 4), 98), torch.full((2, 5), 8)), dim=1)
    given = {"input_ids": ids, "token_type_ids": (ids == 98).long()}
    given["pixel_values"] = torch.randn(2, 3, 16, 16)
    original, model = with_image(), iha.upcycle(with_image(), 3, causal="token", **NOISE)
    expected = original(**given).logits
    torch.testing.assert_close(model(**given).logits, expected, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match=r"see later ones .* upcycle it with causal='token'"):
        iha.upcycle(with_image(), 3)(**given)
    # Nothing is refused where only the tower is IHA, or where there is no image.
    tower = iha.upcycle(with_image(), 3, ["*vision*"], **NOISE)
    torch.testing.assert_close(tower(**given).logits, expected, atol=2e-5, rtol=0)
    text = {"input_ids": ids.clamp(max=97)}
    found, expected = (m(**text).logits for m in (iha.upcycle(with_image(), 3), original))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_prefix_mask_of_ones_own_is_kept_or_refused(dtype: torch.dtype) -> None:
    mask = torch.ones(11, 11, dtype=torch.bool).tril()
    mask[:, :5] = True
    if dtype != torch.bool:
        mask = torch.zeros(11, 11).masked_fill(~mask, torch.finfo(dtype).min)
    ids = torch.arange(11)[None] + 3
    given = {"input_ids": ids, "attention_mask": mask[None, None]}
    original, model = pair("llama", causal="token")
    expected = original(**given).logits
    assert (expected - original(ids).logits).abs().max() > 0.1
    torch.testing.assert_close(model(**given).logits, expected, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="which causal='flat' would cut"):
        pair("llama")[1](**given)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layers_that_are_not_chosen_keep_their_attention(implementation: str) -> None:
    original, model = tiny("llama", implementation), tiny("llama", implementation)
    iha.upcycle(model, {1: 3}, init="scratch")
    changed = [hasattr(layer.self_attn, "head_mixing") for layer in model.model.layers]
    assert changed == [False, True, False]
    given = inputs("llama")
    states, expected = (
        m(**given, output_hidden_states=True).hidden_states for m in (model, original)
    )
    torch.testing.assert_close(states[1][0], expected[1][0], atol=1e-5, rtol=0)
    assert (states[2][0] - expected[2][0]).abs().max() > 0.1


def test_the_cache_is_an_ordinary_one() -> None:
    original, model = pair("qwen3", pseudo_heads=4)
    given = inputs("qwen3")
    caches = [m(**given, use_cache=True).past_key_values for m in (original, model)]
    for expected, layer in zip(caches[0].layers, caches[1].layers, strict=True):
        assert layer.keys.shape == expected.keys.shape == (2, 2, 11, 8)
    first, expected = caches[1].layers[0], caches[0].layers[0]
    assert torch.equal(first.keys, expected.keys)
    assert torch.equal(first.values, expected.values)
