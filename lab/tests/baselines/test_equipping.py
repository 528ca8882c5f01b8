"""Whole models with every attention: they run, learn, decode, are saved, or refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    StaticCache,
)

import iha
from iha_lab import baselines
from lab.tests.baselines.models import (
    CACHED,
    EVERY,
    PLAIN_AT_START,
    away_from_the_start,
    bert,
    bert_config,
    llama,
    llama_config,
)

EVERY_KIND = pytest.mark.parametrize("kind", EVERY)
CACHED_KINDS = pytest.mark.parametrize("kind", CACHED)


def equipped(kind: str, model: Any) -> Any:
    return away_from_the_start(baselines.equip(model, EVERY[kind], seq_len=16))


def tokens(N: int = 8) -> Tensor:
    return torch.randint(3, 99, (2, N), generator=torch.Generator().manual_seed(2))


def learns(model: Any, loss: Tensor) -> None:
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if ".baseline." in name or ".head_mixing." in name:
            assert parameter.grad.abs().sum() > 0, name


@EVERY_KIND
def test_a_decoder_learns(kind: str) -> None:
    model = baselines.equip(llama(), EVERY[kind])
    learns(model, model(tokens(), labels=tokens()).loss)


@EVERY_KIND
def test_an_encoder_learns_and_sees_no_padding(kind: str) -> None:
    model = baselines.equip(bert(), EVERY[kind])
    inputs = torch.randint(0, 2, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(inputs)
    mask[1, 5:] = 0
    out = model(inputs, attention_mask=mask, labels=torch.zeros_like(inputs))
    learns(model, out.loss)
    alone = model(inputs[1:, :5]).logits
    torch.testing.assert_close(out.logits[1:, :5], alone, rtol=1e-4, atol=1e-4)
    # It does see what comes later, as far as its windows reach.
    inputs[0, -1] = 1 - inputs[0, -1]
    changed = (model(inputs, attention_mask=mask).logits - out.logits)[0].abs().amax(-1) > 1e-6
    first = {"local-global": 6, "2-simplicial-windows": 5}.get(kind, 0)
    assert changed.tolist() == [n >= first for n in range(9)]


@EVERY_KIND
def test_a_decoder_sees_nothing_later_and_no_padding(kind: str) -> None:
    model = equipped(kind, llama())
    whole = model(tokens()).logits
    torch.testing.assert_close(model(tokens()[:, :5]).logits, whole[:, :5], rtol=1e-4, atol=1e-4)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens()], 1)
    positions = torch.arange(11)[None] - 3
    out = model(padded, attention_mask=padded != 0, position_ids=positions.clamp(min=0)).logits
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, 3:], whole, rtol=1e-4, atol=1e-4)


@EVERY_KIND
def test_packed_sequences_do_not_see_each_other(kind: str) -> None:
    model = equipped(kind, llama())
    one, two = tokens()[:1], tokens()[1:, :5]
    positions = torch.cat([torch.arange(8), torch.arange(5)])[None]
    packed = model(torch.cat([one, two], 1), position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(one).logits, model(two).logits], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)


@CACHED_KINDS
@pytest.mark.parametrize("padding", [0, 3])
def test_decoding_with_a_cache_is_decoding_without(kind: str, padding: int) -> None:
    model = equipped(kind, llama())
    inputs = tokens()
    mask = torch.ones_like(inputs)
    mask[0, :padding] = 0
    options: Any = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with_cache = model.generate(inputs, **options)
    without = model.generate(inputs, use_cache=False, **options)
    assert torch.equal(with_cache.sequences, without.sequences)
    for found, expected in zip(with_cache.logits, without.logits, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@CACHED_KINDS
def test_a_preallocated_cache_decodes_the_same(kind: str) -> None:
    model = equipped(kind, llama())
    cache = StaticCache(config=model.config, max_cache_len=20)
    parts = [
        model(part, past_key_values=cache, position_ids=torch.arange(first, last)[None]).logits
        for part, first, last in (
            (tokens()[:, :5], 0, 5),
            (tokens()[:, 5:6], 5, 6),
            (tokens()[:, 6:], 6, 8),
        )
    ]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["2-simplicial", "multi-token", "dcmha"])
def test_what_has_no_cache_refuses_one(kind: str) -> None:
    model = equipped(kind, llama())
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(tokens(), max_new_tokens=2, do_sample=False)
    assert model.generate(tokens(), max_new_tokens=2, use_cache=False).shape == (2, 10)


@pytest.mark.parametrize("kind", PLAIN_AT_START)
@pytest.mark.parametrize("family", [llama, bert])
def test_the_start_is_the_plain_model_where_it_should_be(kind: str, family: Any) -> None:
    inputs = tokens() % 2
    plain = family()(inputs).logits
    found = baselines.equip(family(), PLAIN_AT_START[kind])(inputs).logits
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(EVERY.keys() - {"mha"}))
def test_away_from_the_start_it_is_another_function(kind: str) -> None:
    assert not torch.allclose(equipped(kind, llama())(tokens()).logits, llama()(tokens()).logits)


def test_every_fifth_layer_is_global() -> None:
    model = baselines.equip(llama(num_hidden_layers=11), baselines.LocalGlobalConfig(window=2))
    windowed = [hasattr(layer.self_attn, "baseline") for layer in model.model.layers]
    assert windowed == [i % 5 != 4 for i in range(11)]


def test_iha_takes_the_papers_schedule() -> None:
    attention = baselines.InterleavedConfig(pseudo_heads=2, schedule=True)
    model = baselines.equip(llama(num_hidden_layers=6), attention, seq_len=48)
    windows = [
        layer.self_attn.iha.window if hasattr(layer.self_attn, "iha") else None
        for layer in model.model.layers
    ]
    assert windows == [6, 6, 6, 6, None, 6]
    assert model.config.iha["rope"] == "virtual"


@EVERY_KIND
def test_a_state_dict_restores_it(kind: str) -> None:
    model = equipped(kind, llama())
    fresh = baselines.equip(llama(), EVERY[kind])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("kind", ["knocking-heads", "2-simplicial", "gated", "differential-v2"])
def test_a_copy_has_its_own_hooks(kind: str) -> None:
    model = equipped(kind, llama())
    before = model(tokens()).logits
    other = copy.deepcopy(model)
    away_from_the_start(other)
    assert torch.equal(model(tokens()).logits, before)
    assert not torch.allclose(other(tokens()).logits, before)


@EVERY_KIND
def test_half_precision(kind: str) -> None:
    model = baselines.equip(llama().to(torch.bfloat16), EVERY[kind])
    # The mixing tensors of IHA stay float32: near 1 they would not move in bfloat16.
    mixed = isinstance(EVERY[kind], baselines.InterleavedConfig)
    mixing = {torch.float32} if mixed else set()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} | mixing
    assert model(tokens()).logits.isfinite().all()


def test_a_second_attention_is_refused() -> None:
    for first in (baselines.TalkingHeadsConfig(), baselines.InterleavedConfig()):
        with pytest.raises(ValueError, match="another attention already"):
            baselines.equip(baselines.equip(llama(), first), baselines.DifferentialConfig())


def test_heads_without_a_pair_are_refused_and_the_model_left_as_it_was() -> None:
    model = llama(num_attention_heads=4, num_key_value_heads=1)
    with pytest.raises(ValueError, match="key/value heads in pairs, and the model has 1"):
        baselines.equip(model, baselines.DifferentialConfig())
    assert not any(".baseline." in name for name, _ in model.named_modules())
    assert torch.isfinite(model(tokens()).logits).all()


@pytest.mark.parametrize(
    "attention",
    [
        baselines.KnockingHeadsConfig(),
        baselines.SimplicialConfig(),
        baselines.GatedConfig(),
        baselines.DifferentialV2Config(),
        baselines.ComposableConfig(),
    ],
)
def test_projections_in_one_matrix_are_refused(attention: Any) -> None:
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    with pytest.raises(ValueError, match="projection of its own"):
        baselines.equip(GPT2LMHeadModel(config), attention)


def test_differential_attention_v2_refuses_heads_that_it_cannot_double() -> None:
    sizes = {**llama_config().to_diff_dict(), "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="norms all query heads together"):
        baselines.equip(Olmo2ForCausalLM(Olmo2Config(**sizes)), baselines.DifferentialV2Config())
    config = OPTConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        ffn_dim=48,
        num_attention_heads=4,
        max_position_embeddings=32,
        word_embed_proj_dim=32,
    )
    model = baselines.equip(OPTForCausalLM(config).eval(), baselines.DifferentialV2Config())
    with pytest.raises(ValueError, match="splits its queries into 4 heads"):
        model(tokens())


def test_attention_dropout_is_refused_in_training() -> None:
    model = baselines.equip(llama(attention_dropout=0.1), baselines.TalkingHeadsConfig())
    assert model(tokens()).logits.isfinite().all()
    with pytest.raises(ValueError, match="set attention_dropout"):
        model.train()(tokens())


def test_a_soft_cap_is_refused() -> None:
    config = Gemma2Config(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = baselines.equip(Gemma2ForCausalLM(config), baselines.TalkingHeadsConfig())
    with pytest.raises(ValueError, match="softcap"):
        model(tokens())


def test_another_attention_set_later_is_refused() -> None:
    model = baselines.equip(llama(), baselines.TalkingHeadsConfig())
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="would leave its baseline out"):
        model(tokens())


def test_a_schedule_needs_a_length_and_causal_layers() -> None:
    attention = baselines.InterleavedConfig(schedule=True)
    with pytest.raises(ValueError, match="seq_len must be given"):
        baselines.equip(llama(), attention)
    with pytest.raises(ValueError, match="set schedule=False"):
        baselines.equip(bert(), attention, 64)


def perturbed(model: Any) -> Any:
    """With mixing tensors as after training."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, iha.HeadMixing):
            for parameter in module.parameters():
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("collapse", ["full", "per-head"])
def test_folded_is_multi_head_attention_with_other_weights(collapse: Any) -> None:
    attention = baselines.InterleavedConfig(pseudo_heads=1, collapse=collapse)
    model = perturbed(baselines.equip(llama(), attention))
    folded = {
        name: weight for name, weight in model.state_dict().items() if "head_mixing" not in name
    }
    before = model(tokens()).logits
    plain = llama()
    for layer in model.model.layers:
        at = layer.self_attn
        at.head_mixing.fold_(at.q_proj, at.k_proj, at.v_proj, at.o_proj)
    plain.load_state_dict(folded)  # the same storage, folded in place
    torch.testing.assert_close(plain(tokens()).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rope", ["token", "fractional", "virtual"])
def test_paired_heads_are_iha_with_a_fixed_one_hot_mixing(rope: Any) -> None:
    paired = baselines.equip(llama(), baselines.PairedHeadsConfig(rope=rope))
    model = baselines.equip(llama(), baselines.InterleavedConfig(pseudo_heads=2, rope=rope))
    for module in model.modules():
        if isinstance(module, iha.HeadMixing):
            for tensor in (module.alpha_q, module.alpha_k, module.alpha_v):
                tensor.data.zero_()
                half = len(tensor) // 2
                for h in range(len(tensor)):
                    for p in range(2):
                        tensor.data[h % half + p * half, h, p] = 1
            module.collapse.data.zero_()
            for h in range(4):
                module.collapse.data[h, h, h // 2] = 1
    expected = model(tokens()).logits
    torch.testing.assert_close(paired(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    options: Any = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(paired.generate(tokens(), **options), model.generate(tokens(), **options))


def test_heads_of_another_number_are_in_the_config() -> None:
    attention = baselines.MultiHeadConfig(heads=8)
    config = attention.configure(llama_config())
    model = baselines.equip(LlamaForCausalLM(config), attention)
    projection = model.model.layers[0].self_attn.k_proj
    assert (config.num_key_value_heads, projection.out_features, config.head_dim) == (4, 16, 4)
    assert baselines.cost(model, 16) == baselines.cost(llama(), 16)
    wide = baselines.MultiHeadConfig(heads=8, head_dim=8)
    model = baselines.equip(LlamaForCausalLM(wide.configure(llama_config())), wide)
    assert model.model.layers[0].self_attn.q_proj.out_features == 64
    assert model(tokens()).logits.isfinite().all()
    changed, off = baselines.matched(LlamaForCausalLM, llama_config(), wide, 16)
    assert (changed.num_attention_heads, changed.head_dim) == (8, 8)
    assert abs(off) < 0.01
    with pytest.raises(ValueError, match="build it from configure"):
        baselines.equip(llama(), attention)
    for refused, config, why in (
        (baselines.MultiHeadConfig(heads=6), llama_config(num_key_value_heads=1), "multiple of 4"),
        (baselines.MultiHeadConfig(heads=12), llama_config(), "must divide the width, 32"),
        (baselines.MultiHeadConfig(heads=32), llama_config(), "even number"),
        (baselines.MultiHeadConfig(heads=8, head_dim=8), bert_config(), "leave it out"),
    ):
        with pytest.raises(ValueError, match=why):
            refused.configure(config)


def test_what_does_not_mix_stays_plain_and_does_not_train() -> None:
    attention = baselines.InterleavedConfig(pseudo_heads=2, mixes=("k",))
    mixing = baselines.equip(llama(), attention).model.layers[0].self_attn.head_mixing
    assert [p.requires_grad for p in mixing.parameters()] == [False, True, False, False]
    for tensor, share in ((mixing.alpha_q, 1), (mixing.alpha_v, 1), (mixing.collapse, 0.5)):
        for p in range(2):
            assert torch.equal(tensor[..., p], share * torch.eye(len(tensor)))
    assert not torch.equal(mixing.alpha_k[..., 0], torch.eye(2))
    frozen = baselines.InterleavedConfig(learned=False)
    mixing = baselines.equip(llama(), frozen).model.layers[0].self_attn.head_mixing
    assert not any(p.requires_grad for p in mixing.parameters())
    assert not torch.equal(mixing.alpha_q[..., 0], torch.eye(4))


def test_a_shift_gives_each_pseudo_head_the_next_head() -> None:
    attention = baselines.InterleavedConfig(pseudo_heads=3, pseudo_queries=2, init="shift")
    mixing = baselines.equip(llama(), attention).model.layers[0].self_attn.head_mixing
    heads = torch.arange(4.0)
    # Two query heads share a key head; the last two pseudo-queries of three.
    assert torch.einsum("m,mhp->hp", heads, mixing.alpha_q)[:, 0].tolist() == [2, 3, 0, 1]
    assert torch.einsum("m,mhp->hp", heads, mixing.alpha_q)[:, 1].tolist() == [0, 1, 2, 3]
    assert torch.einsum("m,mgp->pg", heads[:2], mixing.alpha_k).tolist() == [[0, 1], [1, 0], [0, 1]]
    sent_back = torch.einsum("ohp,mhp->om", mixing.collapse, mixing.alpha_q)
    assert torch.equal(sent_back, torch.eye(4))
    with pytest.raises(ValueError, match="collapse = 'full'"):
        baselines.InterleavedConfig(init="shift", collapse="per-head")
    with pytest.raises(ValueError, match="at most pseudo_heads = 2"):
        baselines.InterleavedConfig(pseudo_heads=2, pseudo_queries=3)


def test_configs_have_names_of_their_own() -> None:
    assert len({config.label for config in EVERY.values()}) == len(EVERY)
