"""The weights that are shown are those that the model computes with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import StaticCache

import iha
from tests.hf.families import DECODER, DECODERS, inputs, moved, tiny, tiny_llava, trained

EXACT = {"atol": 2e-5, "rtol": 1e-4}


def seen_by_the_mixing(model: Any, given: dict[str, Any]) -> dict[str, tuple[Any, Tensor, Tensor]]:
    """Name of each layer with a mixing → the mixing, the values that it got, its output."""
    seen: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(
            lambda mixing, args, output, name=name: seen.update({name: (mixing, args[2], output)})
        )
        for name, module in model.named_modules()
        if isinstance(module, iha.HeadMixing)
    ]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    return seen


def output_of(pairs: Tensor, mixing: Any, value: Tensor) -> Tensor:
    """The weights on the mixed values, collapsed, as the definition has it."""
    mixed = torch.einsum("bmsd,mgq->bgqsd", value, mixing.alpha_v)
    mixed = mixed.repeat_interleave(mixing.num_heads // mixing.num_kv_heads, 1)
    pseudo = torch.einsum("bhnpsq,bhqsd->bhpnd", pairs, mixed)
    rule = "bhpnd,hp->bhnd" if mixing.collapse.ndim == 2 else "bhpnd,ohp->bond"
    return torch.einsum(rule, pseudo, mixing.collapse)


PACKED = {
    "input_ids": torch.arange(3, 14)[None],
    "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]]),
    "use_cache": False,
}
CASES = [
    *[(family, {}, inputs(family)) for family in (*DECODERS, "gpt2", "bert", "modernbert", "vit")],
    *[(family, {"causal": "token"}, inputs(family)) for family in ("mistral", "bart", "whisper")],
    ("llama", {"window": 3}, inputs("llama")),
    ("llama", {"pseudo_queries": 1}, inputs("llama")),
    ("llama", {"rope": "virtual", "init": "scratch"}, inputs("llama")),
    ("gpt_neox", {"rope": "fractional", "init": "scratch"}, inputs("gpt_neox")),
    ("llama", {"per_head_collapse": True}, inputs("llama")),
    ("llama", {"layers": [0, 2]}, PACKED),
]


@pytest.mark.parametrize(("family", "settings", "given"), CASES)
def test_they_give_the_output_of_every_layer(
    family: str, settings: dict[str, Any], given: dict[str, Any]
) -> None:
    model = trained(family, 3, **settings)
    patterns = iha.attention_patterns(model, given)
    seen = seen_by_the_mixing(model, given)
    assert len(seen) == len(model.config.iha["pseudo_heads"])
    for path, (mixing, value, output) in seen.items():
        (name,) = (n for n in patterns if path.endswith(f"{n}.head_mixing"))
        pairs, tokens = patterns[name].pairs, patterns[name].tokens
        B, H, N, _ = output.shape
        S = value.shape[2]
        assert pairs.shape == (B, H, N, mixing.pseudo_queries, S, 3)
        assert tokens.shape == (B, H, N, S)
        torch.testing.assert_close(output_of(pairs, mixing, value), output, **EXACT)
        rows = pairs.sum((-1, -2))
        some = rows[:, :, :, -1] > 0.5  # padding may see nothing
        torch.testing.assert_close(rows[some], torch.ones_like(rows[some]))
        torch.testing.assert_close(tokens.sum(-1)[some], torch.ones_like(rows[some][..., 0]))


def weights_of(output: Any) -> list[Tensor]:
    kinds = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    return [weights for kind in kinds for weights in (getattr(output, kind, None) or ())]


def real(family: str) -> dict[str, Any]:
    """Inputs without padding, in whose rows each library has its own zeros."""
    given = inputs(family)
    return {name: tensor[:1] for name, tensor in given.items() if name != "attention_mask"}


@pytest.mark.parametrize(
    "family", [*DECODERS, "gpt2", "bert", "roberta", "modernbert", "vit", "bart", "whisper"]
)
def test_output_attentions_are_the_plain_models_at_the_start(family: str) -> None:
    plain, model = tiny(family, "eager"), iha.upcycle(tiny(family), 3)
    given = real(family)
    with torch.no_grad():
        expected, found = (weights_of(m(**given, output_attentions=True)) for m in (plain, model))
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "whisper"])
def test_output_attentions_are_the_patterns(family: str) -> None:
    """In the modules' order, which is that of the layers; also with some layers left plain."""
    given = real(family)
    for layers in (None, [1]):
        model = trained(family, 2, layers=layers)
        with torch.no_grad():
            found = weights_of(model(**given, output_attentions=True))
        patterns = [pattern.tokens for pattern in iha.attention_patterns(model, given).values()]
        assert len(found) == len(patterns)
        for weights in found:
            assert any(w.shape == weights.shape and torch.allclose(w, weights) for w in patterns)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "gpt_oss"])
def test_plain_models_give_their_own(family: str) -> None:
    given = real("llama" if family == "gpt_oss" else family)
    plain = with_sinks() if family == "gpt_oss" else tiny(family)
    before = plain.config._attn_implementation
    patterns = list(iha.attention_patterns(plain, given, heads=[2, 0]).values())
    assert plain.config._attn_implementation == before
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        expected = plain(**given, output_attentions=True).attentions
    for pattern, weights in zip(patterns, expected, strict=True):
        torch.testing.assert_close(pattern.tokens, weights[:, [2, 0]], **EXACT)
        assert torch.equal(pattern.pairs[:, :, :, 0, :, 0], pattern.tokens)


def with_sinks() -> Any:
    """Of its attention, rows sum to less than one."""
    sizes = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**{**DECODER, **sizes}, rope_parameters=rope)
    model = transformers.GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def test_some_layers_and_heads_in_the_order_that_is_asked_for() -> None:
    model, given = trained("qwen3", 2), inputs("qwen3")
    whole = iha.attention_patterns(model, given)
    some = iha.attention_patterns(model, given, layers=[1, 2], heads=iter([3, 0]))
    assert list(some) == ["layers.1.self_attn", "layers.2.self_attn"]
    assert some["layers.2.self_attn"].heads == [3, 0]
    pattern = some["layers.1.self_attn"]
    assert torch.equal(pattern.pairs, whole["layers.1.self_attn"].pairs[:, [3, 0]])
    assert torch.equal(pattern.tokens, whole["layers.1.self_attn"].tokens[:, [3, 0]])


def test_a_decoding_step_reads_the_cache() -> None:
    model, given = trained("mistral", 2), real("mistral")
    ids = given["input_ids"]
    whole = iha.attention_patterns(model, {"input_ids": ids}, [2])["layers.2.self_attn"].tokens
    with torch.no_grad():
        cache = model(ids[:, :-1]).past_key_values
    step = {"input_ids": ids[:, -1:], "past_key_values": cache}
    last = iha.attention_patterns(model, step, [2])["layers.2.self_attn"].tokens
    S = last.shape[-1]  # what the window's cache still holds
    torch.testing.assert_close(last, whole[:, :, -1:, -S:], **EXACT)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_collects_them(cache: str) -> None:
    model, given = trained("llama", 3), inputs("llama")
    options = {"max_new_tokens": 3, "output_attentions": True, "return_dict_in_generate": True}
    found = model.generate(
        **given, **options, cache_implementation=cache, do_sample=False, disable_compile=True
    )
    last = torch.cat((given["attention_mask"], torch.ones(2, 2, dtype=torch.long)), 1)
    given = {"input_ids": found.sequences[:, :-1], "attention_mask": last}
    with torch.no_grad():
        expected = model(**given, output_attentions=True).attentions
    for mine, theirs in zip(found.attentions[-1], expected, strict=True):
        torch.testing.assert_close(mine[..., :13], theirs[:, :, -1:], **EXACT)


@torch.no_grad()
def test_a_graph_gives_them_too() -> None:
    model, given = trained("gemma2", 2), inputs("gemma2")
    expected = model(**given, output_attentions=True).attentions
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**given, output_attentions=True).attentions, expected)
    with torch.autocast("cpu", torch.bfloat16):
        pattern = iha.attention_patterns(model, given, [0])["layers.0.self_attn"]
        assert pattern.tokens.dtype == pattern.pairs.dtype == torch.float32


def test_of_a_composite_model_the_parts_that_run() -> None:
    model = moved(iha.upcycle(tiny_llava(), 2, ["language_model*"]))
    ids = torch.arange(3, 12)[None]
    text = ["language_model.layers.0.self_attn", "language_model.layers.1.self_attn"]
    assert list(iha.attention_patterns(model, {"input_ids": ids}))[:2] == text
    ids[0, 1:5] = 98
    given = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}
    patterns = iha.attention_patterns(model, given)
    assert [pattern.tokens.shape[1:] for pattern in patterns.values()] == [(2, 5, 5)] * 2 + [
        (4, 9, 9)
    ] * 3


def test_wrappers_show_what_they_compute() -> None:
    given = inputs("llama")
    wrapped: Any = get_peft_model(
        trained("llama", 2),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["head_mixing"]),
    )
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name:  # an adapter of its own
            parameter.data += 0.3
    wrapped.eval()
    seen = {n: s for n, s in seen_by_the_mixing(wrapped, given).items() if "modules_to_save" in n}
    patterns = list(iha.attention_patterns(wrapped, given).values())
    for pattern, (mixing, value, output) in zip(patterns, seen.values(), strict=True):
        torch.testing.assert_close(output_of(pattern.pairs, mixing, value), output, **EXACT)

    model = trained("llama", 2)
    expected = [pattern.tokens for pattern in iha.attention_patterns(model, given).values()]
    compiled = torch.compile(model, backend="eager")
    found = [pattern.tokens for pattern in iha.attention_patterns(compiled, given).values()]
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_what_is_seen_stays_what_it_was() -> None:
    """Where the mixing or a preallocated cache is written to afterwards."""
    model, ids = trained("llama", 2), real("llama")["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=16)
    given = {"input_ids": ids, "past_key_values": cache}
    patterns = iha.attention_patterns(model, given)
    expected = [pattern.tokens for pattern in patterns.values()]
    cache.reset()
    model(ids.flip(1), past_key_values=cache)
    moved(model, seed=1)
    torch.testing.assert_close([pattern.tokens for pattern in patterns.values()], expected)


@torch.no_grad()
def test_of_a_model_that_is_offloaded() -> None:
    model, given = trained("llama", 2), inputs("llama")
    expected = [pattern.tokens for pattern in iha.attention_patterns(model, given).values()]
    cpu_offload(model, execution_device="cpu")
    assert model.model.layers[0].self_attn.head_mixing.alpha_q.is_meta
    found = iha.attention_patterns(model, given)
    torch.testing.assert_close([pattern.tokens for pattern in found.values()], expected)
    torch.testing.assert_close([*model(**given, output_attentions=True).attentions], expected)


def test_a_head_that_nobody_reads_has_equal_shares() -> None:
    model, given = trained("llama", 2), inputs("llama")
    mixing = model.model.layers[0].self_attn.head_mixing
    with torch.no_grad():
        mixing.collapse[:, 1] = 0
    pattern = iha.attention_patterns(model, given, [0])["layers.0.self_attn"]
    torch.testing.assert_close(pattern.tokens[:, 1], pattern.pairs.sum(-1).mean(3)[:, 1])


def test_half_precision_and_training_keep_their_dtype_and_mode() -> None:
    model = moved(iha.upcycle(tiny("llama").bfloat16(), 2)).train()
    with torch.no_grad():
        attentions = model(**inputs("llama"), output_attentions=True).attentions
    assert {weights.dtype for weights in attentions} == {torch.bfloat16}
    pattern = iha.attention_patterns(model, inputs("llama"), [0])["layers.0.self_attn"]
    assert pattern.pairs.dtype == torch.float32
    assert not pattern.pairs.requires_grad
    assert not pattern.tokens.requires_grad
    model(**inputs("llama"), output_attentions=True).attentions[0].square().sum().backward()
    assert model.model.layers[0].self_attn.head_mixing.alpha_q.grad.abs().sum() > 0
    assert model.training


def test_what_cannot_be_shown_is_refused() -> None:
    model, given = trained("llama", 2), inputs("llama")
    with pytest.raises(ValueError, match="layers names 7, which the model does not have"):
        iha.attention_patterns(model, given, [7])
    with pytest.raises(ValueError, match="heads must be at most 3, got 4"):
        iha.attention_patterns(model, given, heads=[4])
    shared = trained("llama", 2)
    shared.model.layers[1] = shared.model.layers[0]
    with pytest.raises(ValueError, match=r"layers has 'layers\.0\.self_attn', which ran 2 times"):
        iha.attention_patterns(shared, {**given, "use_cache": False})
    assert "attention_seen" not in vars(shared.model.layers[0].self_attn)
