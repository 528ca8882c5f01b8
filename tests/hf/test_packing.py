"""Packed documents do not see each other, in any pass, or are refused: trained models.

What is right is each document by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

import iha
from tests.hf import families
from tests.hf.families import DECODER, inputs, moved

LENGTH = 12
IDS = torch.randint(3, 99, (1, LENGTH), generator=torch.Generator().manual_seed(0))
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 0}
QUIET = contextlib.nullcontext()


def trained(family: str, causal: Any = "flat", **settings: Any) -> Any:
    return families.trained(family, 3, causal=causal, **settings)


LENGTHS = (5, 1, 6)
DOCUMENTS = IDS.split(LENGTHS, dim=1)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
BOUNDS = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
PACKED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "the default cache": lambda config: {},
    "no cache": lambda config: {"use_cache": False},
    "a mask of ones": lambda config: {"attention_mask": torch.ones_like(IDS)},
    "a static cache": lambda config: {"past_key_values": StaticCache(config, 16)},
    "bounds": lambda config: {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS},
}


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("causal", ["token", "flat"])
@pytest.mark.parametrize("family", ["llama", "mistral", "llama4"])
def test_packed_documents_do_not_see_each_other(family: str, causal: str, layers: Any) -> None:
    """Nor do they in the layers that keep their attention.

    Llama 4 does not hand position_ids down to its attention.
    """
    model = trained(family, causal, layers=layers)
    expected = torch.cat([model(document).logits for document in DOCUMENTS], 1)
    for name, more in PACKED.items():
        given = {"input_ids": IDS, "position_ids": POSITIONS, **more(model.config)}
        torch.testing.assert_close(model(**given).logits, expected, **TOLERANCE, msg=name)


@torch.no_grad()
def test_packed_documents_in_a_compiled_model() -> None:
    model = trained("llama", "flat")
    expected = torch.cat([model(document).logits for document in DOCUMENTS], 1)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for cached in (True, False):
        found = compiled(IDS, position_ids=POSITIONS, use_cache=cached).logits
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
@torch.no_grad()
def test_packed_documents_in_a_cache_are_not_continued(make: Any) -> None:
    """Left padding, whose positions look the same, is; so is a cache that was emptied."""
    model = trained("llama", "flat")
    cache = make(config=model.config, max_cache_len=20) if make is StaticCache else make()
    model(IDS, position_ids=POSITIONS, past_key_values=cache)
    with pytest.raises(ValueError, match=r"^past_key_values holds packed documents"):
        model(IDS[:, :1], past_key_values=cache)

    if make is StaticCache:
        cache.reset()
    else:
        cache.crop(-LENGTH)
    padding = torch.zeros(1, 3, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(IDS)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = torch.cat([padding, IDS], 1)
    found = [
        model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        ).logits
        for start, end in ((0, 12), (12, 13), (13, 15))
    ]
    torch.testing.assert_close(torch.cat(found, 1)[:, 3:], model(IDS).logits, **TOLERANCE)


@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
@pytest.mark.parametrize("continued", ["eager", "compiled"])
@torch.no_grad()
def test_a_compiled_pass_notes_packed_documents_too(make: Any, continued: str) -> None:
    """And that there were none, as where a mask hides what looks like more."""
    model = trained("llama", "flat")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    go_on = compiled if continued == "compiled" else model
    padding = torch.zeros(1, 3, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(IDS)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = torch.cat([padding, IDS], 1)

    def prefill(**given: Any) -> Any:
        cache = make(model.config, max_cache_len=20) if make is StaticCache else make()
        return compiled(**given, past_key_values=cache).past_key_values

    for refused in (True, False):
        given = {"input_ids": IDS, "position_ids": POSITIONS}
        if not refused:
            given["position_ids"] = torch.arange(LENGTH)[None]
        cache = prefill(**given)
        with pytest.raises((ValueError, RuntimeError), match="packed doc") if refused else QUIET:
            go_on(IDS[:, :1], past_key_values=cache)
    cache = prefill(input_ids=ids[:, :9], attention_mask=mask[:, :9], position_ids=positions[:, :9])
    found = go_on(
        ids[:, 9:], attention_mask=mask, position_ids=positions[:, 9:], past_key_values=cache
    )
    torch.testing.assert_close(found.logits, model(IDS).logits[:, 6:], **TOLERANCE)


@torch.no_grad()
def test_layers_without_iha_note_packed_documents_too() -> None:
    """A decoder whose layers keep their attention, of a model whose encoder is IHA."""
    model = trained("bart", layers=["encoder.*"])
    decoder = model.model.decoder
    cache = DynamicCache()
    layer = decoder.layers[0].self_attn
    states = torch.randn(1, LENGTH, 32)
    layer(states, past_key_values=cache, position_ids=POSITIONS)
    with pytest.raises(ValueError, match=r"^past_key_values holds packed documents"):
        layer(states[:, :1], past_key_values=cache)


STATEFUL: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention", "conv"]}),
    "olmo_hybrid": (
        "OlmoHybridForCausalLM",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "block_size": 4,
        },
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "head_dim": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("family", STATEFUL)
def test_packed_documents_are_refused_where_layers_carry_a_state(family: str) -> None:
    """Convolutions and linear attention would go on from one to the next."""
    name, settings = STATEFUL[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = moved(iha.upcycle(cls(cls.config_class(**DECODER | settings)).eval(), 2))
    for call in (model, model.model):
        with pytest.raises(ValueError, match=r"carry a state.*give each document a row"):
            call(IDS, None, POSITIONS)
    with pytest.raises(ValueError, match="carry a state"):
        model(IDS, cu_seq_lens_q=BOUNDS, cu_seq_lens_k=BOUNDS)
    # Left padding, whose positions look the same, is not packing.
    given = inputs("llama")
    positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    found = model(**given, position_ids=positions).logits[1, 4:]
    expected = model(given["input_ids"][1:, 4:]).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("family", ["bert", "modernbert", "roberta"])
def test_packed_documents_in_an_encoder(family: str, layers: Any) -> None:
    model = trained(family, layers=layers)
    first = 2 if family == "roberta" else 0  # 1 is padding's
    expected = torch.cat(
        [
            model(document, position_ids=torch.arange(document.shape[1])[None] + first).logits
            for document in DOCUMENTS
        ],
        1,
    )
    for more in ({}, {"attention_mask": torch.ones_like(IDS)}):
        found = model(IDS, position_ids=POSITIONS + first, **more).logits
        torch.testing.assert_close(found, expected, **TOLERANCE)


@torch.no_grad()
def test_flattened_batches_of_the_collator() -> None:
    model = trained("llama", "flat")
    rows = [{"input_ids": document[0].tolist()} for document in DOCUMENTS]
    for more in ({}, {"return_flash_attn_kwargs": True}):
        batch = DataCollatorWithFlattening(return_tensors="pt", **more)(rows)
        expected = torch.cat([model(document).logits for document in DOCUMENTS], 1)
        torch.testing.assert_close(model(**batch).logits, expected, **TOLERANCE)


@torch.no_grad()
def test_positions_that_do_not_pack() -> None:
    """Left padding, positions that begin later, and a jump ahead within one document."""
    model = trained("llama", "flat")
    given = inputs("llama")
    mask = given["attention_mask"]
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    found = model(**given, position_ids=positions).logits[1, 4:]
    torch.testing.assert_close(found, model(given["input_ids"][1:, 4:]).logits[0], **TOLERANCE)

    later = torch.arange(LENGTH)[None] + 40
    torch.testing.assert_close(
        model(IDS, position_ids=later).logits, model(IDS).logits, atol=1e-4, rtol=0
    )
    jump = torch.where(torch.arange(LENGTH) < 6, later, later + 9)
    mask = CAUSAL[None, None]
    expected = model(IDS, position_ids=jump, attention_mask=mask).logits
    torch.testing.assert_close(model(IDS, position_ids=jump).logits, expected, **TOLERANCE)
