"""Who sees whom in a trained model: masks of every kind, compiled or not, caches.

Under flat causality tokens see what a mask says, so a plain model is no truth for a trained one:
that is then the same model without a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    DynamicCache,
    MllamaConfig,
    MllamaForConditionalGeneration,
    StaticCache,
)

import iha
from tests.hf import families
from tests.hf.families import DECODER, inputs, tiny

LENGTH = 12
IDS = torch.randint(3, 99, (1, LENGTH), generator=torch.Generator().manual_seed(0))
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 0}


def trained(family: str, causal: Any, **settings: Any) -> Any:
    return families.trained(family, 3, causal=causal, **settings)


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def prefix() -> Tensor:
    mask = CAUSAL.clone()
    mask[:, :5] = True
    return mask


def holes() -> Tensor:
    """Causal, with a third of what is before a token hidden."""
    random = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(1))
    return CAUSAL & ((random > 0.3) | torch.eye(LENGTH, dtype=torch.bool))


LATER, BIAS, KIND = "see later ones", "holds an additive bias", "must be boolean"
MASKS: dict[str, tuple[Callable[[], Tensor | None], str | None, str | None]] = {
    # what is given, why token causality refuses it, why flat causality does
    "none": (lambda: None, None, None),
    "padded": (lambda: torch.arange(LENGTH)[None] > 2, None, None),
    "holes": (lambda: holes()[None, None], None, None),
    "additive holes": (lambda: additive(holes()[None, None]), None, None),
    "prefix": (lambda: prefix()[None, None], None, LATER),
    "additive prefix": (lambda: additive(prefix()[None, None]), None, LATER),
    "bias": (lambda: torch.linspace(-1, 0, LENGTH).expand(1, 1, LENGTH, LENGTH), BIAS, BIAS),
    "bytes": (lambda: CAUSAL[None, None].to(torch.uint8), KIND, KIND),
    "integers": (lambda: CAUSAL[None, None].long(), KIND, KIND),
}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("causal", ["token", "flat"])
def test_a_compiled_model_does_with_a_mask_what_an_eager_one_does(family: str, causal: str) -> None:
    model = trained(family, causal)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name, (mask, *why_not) in MASKS.items():
        refused = why_not[causal == "flat"]
        given = {"input_ids": IDS, "attention_mask": mask()}
        if refused is not None:
            for one in (model, compiled):
                with pytest.raises((ValueError, TypeError), match=refused):
                    one(**given)
        else:
            expected = model(**given).logits
            torch.testing.assert_close(compiled(**given).logits, expected, **TOLERANCE, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("slots", [0, 16])
def test_a_mask_of_ones_own_is_read_once_in_a_graph(slots: int) -> None:
    """To look at its values is to wait for the device. With a static cache, too."""
    graphs: list[str] = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    torch.compiler.reset()
    model = trained("llama", "flat")
    cache = StaticCache(model.config, slots) if slots else None
    mask = torch.nn.functional.pad(CAUSAL, (0, slots - LENGTH)) if slots else CAUSAL
    compiled = torch.compile(model, backend=note, fullgraph=True)
    compiled(IDS, attention_mask=mask[None, None], past_key_values=cache, use_cache=bool(slots))
    assert "".join(graphs).count("ops.iha.visible_tokens") == 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_mask_of_ones_own_says_everything(family: str) -> None:
    """As with SDPA: no causality comes on top of it, and no sliding window of the model's."""
    original, model = tiny(family), iha.upcycle(tiny(family), 3, causal="token")
    for mask in (CAUSAL, prefix(), torch.ones_like(CAUSAL)):
        for given in (mask[None, None], additive(mask)[None, None]):
            expected = original(IDS, attention_mask=given).logits
            found = model(IDS, attention_mask=given).logits
            torch.testing.assert_close(found, expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("convert", [torch.Tensor.bool, additive])
@pytest.mark.parametrize("causal", ["token", "flat"])
@pytest.mark.parametrize(
    ("family", "make"),
    [
        ("llama", lambda config: StaticCache(config, 16)),
        ("gpt_neox", lambda config: StaticCache(config, 16)),
        ("llama", lambda config: DynamicCache(config=config)),
    ],
)
def test_masks_with_a_cache(family: str, make: Any, causal: str, convert: Any) -> None:
    """A prompt, a second one, and single tokens; every slot of the cache has its column."""
    model = trained(family, causal)
    mask = holes()
    expected = model(IDS, attention_mask=mask[None, None], use_cache=False).logits
    cache = make(model.config)
    found, done = [], 0
    for tokens in (6, 4, 1, 1):
        end = done + tokens
        slots = 16 if isinstance(cache, StaticCache) else end
        part = torch.zeros(1, 1, tokens, slots, dtype=torch.bool)
        part[..., :end] = mask[done:end, :end]
        given = {"input_ids": IDS[:, done:end], "attention_mask": convert(part)}
        found.append(model(**given, past_key_values=cache).logits)
        done = end
    torch.testing.assert_close(torch.cat(found, 1), expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("causal", ["token", "flat"])
def test_masks_with_a_sliding_static_cache(causal: str) -> None:
    """Mistral's layers keep 5 slots, and then as many keys before a query as its window has."""
    model = trained("mistral", causal)
    band = CAUSAL & ~CAUSAL.tril(-5)
    expected = model(IDS, attention_mask=band[None, None], use_cache=False).logits
    cache = StaticCache(model.config, 16)
    found, done = [], 0
    for tokens in (3, 1, 1, 1, 1, 3, 2):
        end = done + tokens
        first = max(done - 4, 0)
        part = torch.zeros(1, 1, tokens, max(5, end - first), dtype=torch.bool)
        part[..., : end - first] = band[done:end, first:end]
        given = {"input_ids": IDS[:, done:end], "attention_mask": part}
        found.append(model(**given, past_key_values=cache).logits)
        done = end
    torch.testing.assert_close(torch.cat(found, 1), expected, **TOLERANCE)


def test_a_mask_wider_than_a_cropped_cache_is_refused() -> None:
    model = trained("mistral", "token")
    cache = DynamicCache(config=model.config)
    model(IDS[:, :8], past_key_values=cache)
    with pytest.raises(ValueError, match=r"has 9 columns, and MistralAttention has 5 keys .*2D"):
        model(IDS[:, 8:9], attention_mask=CAUSAL[None, None, 8:9, :9], past_key_values=cache)


def test_a_mask_of_flex_attention_is_refused() -> None:
    block = create_block_mask(lambda b, h, q, k: q >= k, 1, None, 12, 12, device="cpu")
    for layers in (None, [1]):
        with pytest.raises(TypeError, match=r"is a BlockMask.*create_mask"):
            trained("llama", "token", layers=layers)(IDS, attention_mask=block)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.hidden_state. is deprecated:FutureWarning")
@pytest.mark.parametrize("causal", ["token", "flat"])
def test_modules_that_do_not_say_whether_they_are_causal(causal: Any) -> None:
    """Mllama's cross-attention and its vision tower: what SDPA does with them."""

    def build() -> Any:
        torch.manual_seed(0)
        text = {**DECODER, "num_hidden_layers": 2, "cross_attention_layers": [1], "vocab_size": 99}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        vision |= {"num_global_layers": 1, "attention_heads": 4, "image_size": 16, "patch_size": 4}
        vision |= {"vision_output_dim": 64, "intermediate_layers_indices": [0]}
        vision |= {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "num_channels": 3}
        config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=98)
        model = MllamaForConditionalGeneration(config).eval()
        for name, parameter in model.named_parameters():
            if "gate" in name:  # closed at the start: nothing of the image would be seen
                parameter.fill_(0.5)
        return model

    ids = IDS.clone()
    ids[0, 2] = 98
    given = {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 1, 1, 3, 16, 16, generator=torch.Generator().manual_seed(2)),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": (torch.arange(LENGTH) >= 2).long().view(1, LENGTH, 1, 1),
    }
    original, model = build(), iha.upcycle(build(), 3, causal=causal)
    torch.testing.assert_close(model(**given).logits, original(**given).logits, **TOLERANCE)
    families.moved(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**given).logits, model(**given).logits, **TOLERANCE)


def test_whisper_goes_on_after_token_timestamps() -> None:
    """For them transformers switches the whole model to eager, for its cross-attention weights."""
    given = {"input_features": inputs("whisper")["input_features"], "max_new_tokens": 4}
    stamped = {**given, "return_token_timestamps": True}

    def ready(model: Any) -> Any:
        model.generation_config.alignment_heads = [[0, 0], [1, 1]]
        model.generation_config.no_timestamps_token_id = 98
        return model

    for layers in (["encoder.*"], None):
        original, model = ready(tiny("whisper")), ready(iha.upcycle(tiny("whisper"), 3, layers))
        expected, found = (one.generate(**stamped) for one in (original, model))
        assert torch.equal(found["sequences"], expected["sequences"])
        torch.testing.assert_close(found["token_timestamps"], expected["token_timestamps"])

    model = ready(trained("whisper", "flat"))
    expected = model.generate(**given)
    assert torch.equal(model.generate(**stamped)["sequences"], expected)
    assert torch.equal(model.generate(**given), expected)


@torch.no_grad()
def test_eager_attention_is_what_the_other_layers_then_have() -> None:
    for layers in (None, [1]):
        model = trained("llama", "flat", layers=layers)
        positions = torch.arange(LENGTH)[None] % 5  # of packed documents
        several = {"input_ids": IDS, "position_ids": positions, "use_cache": False}
        cases = [{"input_ids": IDS}, inputs("llama"), several]
        expected = [model(**given).logits for given in cases]
        model.set_attn_implementation("eager")
        for given, logits in zip(cases, expected, strict=True):
            kept = given.get("attention_mask", torch.ones_like(IDS)).bool()
            torch.testing.assert_close(model(**given).logits[kept], logits[kept], **TOLERANCE)
        assert model.config._attn_implementation == "eager"


@torch.no_grad()
def test_settings_are_not_read_from_what_wraps_the_tensors() -> None:
    """PEFT's `target_parameters` puts a wrapper where the mixing was, and calls it."""
    model = trained("llama", "flat")
    expected = model(IDS).logits
    config = LoraConfig(target_parameters=["head_mixing.alpha_q"], target_modules=[], r=2)
    torch.testing.assert_close(get_peft_model(model, config)(IDS).logits, expected, **TOLERANCE)


def test_fewer_heads_than_the_mixing_has_are_refused() -> None:
    """What tensor parallelism leaves of a layer in each process."""
    model = trained("llama", "flat")
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        projection = getattr(attention, name)
        projection.weight = torch.nn.Parameter(projection.weight.chunk(2)[0])
    with pytest.raises(ValueError, match=r"holds 2 and 1 of them \(tensor parallelism\).*FSDP"):
        model(IDS)
