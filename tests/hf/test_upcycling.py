"""What `iha.upcycle` accepts, refuses and records; rotary modes; models from scratch."""

from __future__ import annotations

import functools
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import iha
import iha.hf
from iha import HeadMixing
from tests.hf.families import DECODER, SEQ2SEQ, SPECIAL, inputs, tiny


def sizes(model: Any) -> list[int | None]:
    mixings = [getattr(layer.self_attn, "head_mixing", None) for layer in model.model.layers]
    return [None if mixing is None else mixing.pseudo_heads for mixing in mixings]


@pytest.mark.parametrize(
    ("pseudo_heads", "layers", "expected"),
    [
        (2, None, [2, 2, 2]),
        (2, [0, 2], [2, None, 2]),
        (2, ["layers.1.*"], [None, 2, None]),
        (2, ["*self_attn"], [2, 2, 2]),
        ({0: 1, 2: 4}, None, [1, None, 4]),
        ({0: 1, 1: 3, 2: 4}, range(2), [1, 3, None]),
        (2, iter([2]), [None, None, 2]),
        ({"layers.1.self_attn": 5}, None, [None, 5, None]),
    ],
)
def test_layers_and_sizes(pseudo_heads: Any, layers: Any, expected: list[int | None]) -> None:
    model = iha.upcycle(tiny("llama"), pseudo_heads, layers)
    assert sizes(model) == expected
    assert len(iha.mixing_parameters(model)) == 4 * sum(size is not None for size in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pseudo_heads": 0}, r"pseudo_heads must be at least 1, got 0"),
        ({"pseudo_heads": 2.0}, r"pseudo_heads must be an integer, got .*2\.0"),
        ({"pseudo_heads": None}, r"pseudo_heads must be an integer"),
        ({"pseudo_heads": True}, r"pseudo_heads must be an integer"),
        ({"pseudo_heads": 2, "layers": [True]}, r"an index in layers must be an integer"),
        ({"pseudo_heads": {1.5: 2}}, r"an index in pseudo_heads must be an integer"),
        ({"pseudo_heads": {0: 2, 1: -1}}, r"pseudo_heads must be .* got -1"),
        ({"pseudo_heads": {7: 2}}, r"pseudo_heads names 7, .* layers 0 to 2, .*s\.0\.self_attn"),
        ({"pseudo_heads": {}}, r"pseudo_heads must name at least one layer, got {}"),
        ({"pseudo_heads": 2, "pseudo_queries": {}}, r"pseudo_queries must name .* got {}"),
        ({"pseudo_heads": 2, "layers": ["h.0"]}, r"layers names 'h\.0'"),
        ({"pseudo_heads": 2, "layers": []}, r"layers chooses no attention module"),
        ({"pseudo_heads": {0: 2}, "layers": [1]}, r"pseudo_heads has no entry for .*layers\.1"),
        ({"pseudo_heads": 2, "rope": "paper"}, r"rope must be one of .* got 'paper'"),
        ({"pseudo_heads": 2, "init": "zeros"}, r"init must be one of .* got 'zeros'"),
        ({"pseudo_heads": 2, "causal": None}, r"causal must be one of .* got None"),
        ({"pseudo_heads": 2, "window": 0}, r"window must be at least 1, got 0"),
        ({"pseudo_heads": 2, "backend": "fast"}, r"backend must be one of .* got 'fast'"),
    ],
)
def test_bad_arguments_are_refused_and_leave_the_model_alone(
    arguments: dict[str, Any], message: str
) -> None:
    model = tiny("llama")
    with pytest.raises((TypeError, ValueError), match=message):
        iha.upcycle(model, **arguments)
    assert not any(isinstance(module, HeadMixing) for module in model.modules())
    assert getattr(model.config, "iha", None) is None
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("layers", [1, "layers.1.*", 2.0, np.int64(1), True])
def test_one_layer_is_still_a_list(layers: Any) -> None:
    with pytest.raises(TypeError, match="layers must be a list of indices or name patterns"):
        iha.upcycle(tiny("llama"), 2, layers)


def test_what_is_no_transformers_model_is_refused() -> None:
    wrapped = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    for model in (nn.Linear(2, 2), "gpt2", wrapped):
        with pytest.raises(TypeError, match=rf"model must be .*, got {type(model).__name__}"):
            iha.upcycle(model, 2)


def test_a_model_is_upcycled_once() -> None:
    model = iha.upcycle(tiny("llama"), 2)
    with pytest.raises(ValueError, match="model is already upcycled"):
        iha.upcycle(model, 2)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("BloomForCausalLM", {}, "BloomForCausalLM.*no module that uses .* attention interface"),
        ("FalconForCausalLM", {}, "FalconForCausalLM.*no module that uses .* attention interface"),
        ("MambaForCausalLM", {}, "MambaForCausalLM.*no module that uses .* attention interface"),
        (
            "MarkupLMModel",
            SPECIAL,
            "MarkupLMSelfAttention.*nothing in it says whether it is causal",
        ),
        ("DogeForCausalLM", {}, "DogeAttention.*nothing in it says whether it is causal"),
        ("NllbMoeForConditionalGeneration", SEQ2SEQ, "NllbMoeDecoder.*no attention in it says"),
        (
            "SwinModel",
            {"num_attention_heads": [2], "depths": [1], "embed_dim": 16},
            "SwinAttention.*learned position bias",
        ),
        (
            "T5ForConditionalGeneration",
            {"d_model": 32, "d_kv": 8},
            "T5Attention.*position bias",
        ),
        (
            "GptOssForCausalLM",
            {"num_local_experts": 2, "head_dim": 8},
            r"layers\.0\.self_attn.*attention sinks",
        ),
        (
            "DeepseekV3ForCausalLM",
            {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 9, "n_routed_experts": 4},
            r"values have another head dimension \(128\) than its keys \(192\)",
        ),
    ],
)
def test_models_that_the_interface_cannot_serve(
    name: str, settings: dict[str, Any], message: str
) -> None:
    cls = getattr(transformers, name)
    config = cls.config_class()
    sizes = {**DECODER, "num_hidden_layers": 1, **settings}
    model = cls(cls.config_class(**{n: v for n, v in sizes.items() if hasattr(config, n)}))
    with pytest.raises(ValueError, match=message):
        iha.upcycle(model, 2)


def test_another_attention_function_is_refused_when_it_runs() -> None:
    model = iha.upcycle(tiny("llama"), 2)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"set to 'sdpa'.*set_attn_implementation\('iha'\)"):
        model(**inputs("llama"))


def test_an_additive_bias_is_refused() -> None:
    model = iha.upcycle(tiny("llama"), 2)
    bias = torch.linspace(-1, 0, 121).view(1, 1, 11, 11)
    with pytest.raises(ValueError, match="attention_mask holds an additive bias"):
        model(input_ids=torch.ones(1, 11, dtype=torch.long), attention_mask=bias)


IDS = torch.arange(3, 9)[None]


def other_forward(self: Any, hidden_states: torch.Tensor, **options: Any) -> Any:
    """As Unsloth's: attention without the interface."""
    return self.o_proj(self.v_proj(hidden_states).repeat_interleave(2, -1)), None


other_forward.__module__ = "unsloth.models.llama"


@pytest.mark.parametrize("of", ["class", "module"])
@pytest.mark.parametrize("when", ["before", "after", "compiled"])
def test_a_replaced_forward_is_refused_by_name(
    of: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would leave the mixing out without a word."""
    model = tiny("llama")
    if when != "before":
        iha.upcycle(model, 2)
        model(**inputs("llama"))  # as it is
    module = model.model.layers[1].self_attn
    own = other_forward if of == "class" else functools.partial(other_forward, module)
    if of == "module":
        functools.update_wrapper(own, other_forward)
    monkeypatch.setattr(type(module) if of == "class" else module, "forward", own)
    run: Any = {"before": lambda: iha.upcycle(model, 2), "after": lambda: model(IDS)}.get(
        when, lambda: torch.compile(model, backend="eager")(IDS)
    )
    with torch.no_grad(), pytest.raises(Exception, match=r"LlamaAttention.*unsloth\.models\.llama"):
        run()


def test_accelerates_wrapped_forward_is_no_replacement() -> None:
    model = tiny("llama")
    accelerate.hooks.add_hook_to_module(
        model.model.layers[1].self_attn, accelerate.hooks.ModelHook()
    )
    model = iha.upcycle(model, 2)
    accelerate.hooks.add_hook_to_module(
        model.model.layers[2].self_attn, accelerate.hooks.ModelHook()
    )
    model(**inputs("llama"))


def test_mixing_parameters_of_a_plain_model() -> None:
    with pytest.raises(ValueError, match=r"no mixing tensors; .*upcycle it first"):
        iha.mixing_parameters(tiny("llama"))


# Rotary modes, against a layer written out by hand with the model's own weights.


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("rope", ["virtual", "fractional"])
def test_rotary_modes_place_every_pseudo_head(family: str, rope: Any) -> None:
    """One layer's output equals attention over N·P tokens that are rotated one by one."""
    P = 3
    model = iha.upcycle(tiny(family), P, init="scratch", rope=rope)
    base = model.base_model
    attention = getattr(base.layers[0], "self_attn", None) or base.layers[0].attention
    x = torch.randn(1, 6, 32)
    heads = attention.head_mixing.num_heads
    kv_heads = attention.head_mixing.num_kv_heads
    if family == "gpt_neox":
        q, k, v = attention.query_key_value(x).view(1, 6, heads, -1).transpose(1, 2).chunk(3, -1)
        output = attention.dense
    else:
        norm_q = getattr(attention, "q_norm", nn.Identity())
        norm_k = getattr(attention, "k_norm", nn.Identity())
        q = norm_q(attention.q_proj(x).view(1, 6, heads, -1)).transpose(1, 2)
        k = norm_k(attention.k_proj(x).view(1, 6, kv_heads, -1)).transpose(1, 2)
        v = attention.v_proj(x).view(1, 6, kv_heads, -1).transpose(1, 2)
        output = attention.o_proj

    def virtual_tokens(tensor: torch.Tensor, alpha: torch.Tensor, turn: bool) -> torch.Tensor:
        mixed = torch.einsum("bmnd,mhp->bhnpd", tensor, alpha)
        if turn:
            n = torch.arange(6.0)[:, None]
            p = torch.arange(float(P))
            position = n * P + p if rope == "virtual" else n + p / P
            angle = position[..., None] * base.rotary_emb.inv_freq
            cos, sin = angle.cos(), angle.sin()
            r = angle.shape[-1]
            a, b, rest = mixed[..., :r], mixed[..., r : 2 * r], mixed[..., 2 * r :]
            mixed = torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
        return mixed.flatten(2, 3)

    mixing = attention.head_mixing
    out = nn.functional.scaled_dot_product_attention(
        virtual_tokens(q, mixing.alpha_q, True),
        virtual_tokens(k, mixing.alpha_k, True),
        virtual_tokens(v, mixing.alpha_v, False),
        is_causal=True,
        enable_gqa=True,
        scale=attention.scaling,
    )
    out = torch.einsum("bhnpd,ohp->bnod", out.unflatten(2, (6, P)), mixing.collapse)
    expected = output(out.flatten(2))

    positions = torch.arange(6)[None]
    found = attention(
        hidden_states=x,
        attention_mask=None,
        position_embeddings=base.rotary_emb(x, positions),
        position_ids=positions,
    )[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "smollm3"])
@pytest.mark.parametrize("rope", ["virtual", "fractional"])
def test_decoding_with_a_cache_equals_the_full_pass(family: str, rope: Any) -> None:
    model = iha.upcycle(tiny(family), {0: 2, 2: 3}, init="scratch", rope=rope)
    ids = inputs(family)["input_ids"][:1]
    with torch.no_grad():
        full = model(ids).logits
        cache = None
        for n in range(ids.shape[1]):
            out = model(ids[:, n : n + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            torch.testing.assert_close(out.logits[:, 0], full[:, n], atol=1e-5, rtol=1e-5)


# From scratch.


def test_the_papers_schedule_on_a_model_from_config() -> None:
    schedule = iha.hybrid_schedule(5, 64, 2)
    config = LlamaConfig(**{**DECODER, "num_hidden_layers": 5})
    model = iha.upcycle(
        AutoModelForCausalLM.from_config(config),
        schedule.pseudo_heads,
        layers=schedule.layers,
        window=schedule.window,
        rope="virtual",
        init="scratch",
    )
    assert sizes(model) == [2, 2, 2, 2, None]
    ids = torch.randint(3, 99, (2, 64))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in iha.mixing_parameters(model))
    assert model.config.iha["window"] == 8


def test_a_window_limits_what_a_layer_sees() -> None:
    """By influence, through the whole model: 3 layers reach 3·W tokens back, not further."""
    model = iha.upcycle(tiny("llama"), 2, init="scratch", window=2)
    ids = torch.randint(3, 99, (1, 12))
    other = ids.clone()
    other[0, 1] = (other[0, 1] - 2) % 96 + 3
    with torch.no_grad():
        changed = (model(ids).logits != model(other).logits).any(-1)[0]
    assert not changed[0]
    assert changed[1]
    assert not changed[1 + 3 * 2 + 1 :].any()


@torch.no_grad()
def test_a_window_is_for_causal_layers_alone() -> None:
    """An encoder sees all of its input, and so does attention from one sequence to another."""
    given = inputs("bart")
    original = tiny("bart")
    for layers in (["encoder.*"], ["decoder.*.encoder_attn"]):
        model = iha.upcycle(tiny("bart"), 2, layers, window=2)
        torch.testing.assert_close(
            model(**given).logits, original(**given).logits, atol=2e-5, rtol=0
        )
    model = iha.upcycle(tiny("bart"), 2, ["decoder.*.self_attn"], window=2)
    assert (model(**given).logits - original(**given).logits).abs().max() > 0.01
