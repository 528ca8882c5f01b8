"""A model of torchtitan with IHA, against the same weights in transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan")

import torchtitan.models.llama3 as llama3
import torchtitan.tools.utils as utils
from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.models.common.attention import create_varlen_metadata_for_document
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from transformers import LlamaConfig, LlamaForCausalLM

import iha
from examples.torchtitan.iha_titan import MIXING, InterleavedInner, interleaved, with_mixing

utils.device_type, utils.device_module = "cpu", torch.cpu  # it takes CUDA where there is no GPU
P, TOKENS = 3, 32


def config_and_model(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = llama3.model_registry("debugmodel", attn_backend="varlen").model
    for layer in config.layers:
        rope = dataclasses.replace(layer.attention.rope, max_seq_len=128, scaling="none")
        layer.attention = dataclasses.replace(layer.attention, rope=rope)
        layer.attention = interleaved(layer.attention, pseudo_heads=P, **options)
    model = config.build()
    model.init_states()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "inner_attention" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return config, model


def in_transformers(config: Any, model: Any, **options: Any) -> Any:
    attention, feed_forward = config.layers[0].attention, config.layers[0].feed_forward
    plain = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.tok_embeddings.weight.shape[0],
            hidden_size=attention.dim,
            intermediate_size=feed_forward.w1.out_features,
            num_hidden_layers=len(config.layers),
            num_attention_heads=attention.n_heads,
            num_key_value_heads=attention.n_kv_heads or attention.n_heads,
            rms_norm_eps=model.norm.eps,
            rope_parameters={"rope_type": "default", "rope_theta": attention.rope.theta},
            tie_word_embeddings=False,
            max_position_embeddings=128,
        )
    )
    return iha.upcycle(plain, P, **options)


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"causal": "token"}])
def test_packed_documents_in_both(options: dict[str, Any]) -> None:
    config, model = config_and_model(**options)
    adapter = with_mixing(Llama3StateDictAdapter)(config, None)
    exported = adapter.to_hf(model.state_dict())
    theirs = in_transformers(config, model, **options)
    theirs.load_state_dict(exported, strict=True)
    ids = torch.randint(3, 2000, (1, TOKENS))
    positions = torch.cat([torch.arange(20), torch.arange(TOKENS - 20)])[None]
    masks = create_varlen_metadata_for_document(positions)
    found = model(ids, positions=positions, attention_masks=masks)
    wanted = theirs(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)

    found.square().mean().backward()
    wanted.square().mean().backward()
    layer, other = model.layers["0"].attention.inner_attention, theirs.model.layers[0].self_attn
    for name in MIXING:
        gradient = getattr(layer, name).grad
        assert gradient.abs().max() > 0
        torch.testing.assert_close(
            gradient, getattr(other.head_mixing, name).grad, atol=1e-5, rtol=1e-3
        )

    back = adapter.from_hf(exported)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_the_papers_schedule_by_the_command_lines_words() -> None:
    spec = llama3.model_registry("debugmodel", attn_backend="varlen")
    name = "examples.torchtitan.iha_titan.scheduled"
    given = [(name, {"pseudo_heads": 2, "seq_len": 64})]
    apply_overrides(OverrideConfig(imports=given), spec)
    inner = [layer.attention.inner_attention for layer in spec.model.layers]
    mixed = [i for i, one in enumerate(inner) if isinstance(one, InterleavedInner.Config)]
    schedule = iha.hybrid_schedule(len(inner), 64, 2)
    assert tuple(mixed) == schedule.layers != tuple(range(len(inner)))
    assert {inner[i].options["window"] for i in mixed} == {schedule.window}


def test_a_model_that_was_built_empty_starts_exactly() -> None:
    layer = llama3.model_registry("debugmodel", attn_backend="varlen").model.layers[0].attention
    with torch.device("meta"):
        inner = interleaved(layer, pseudo_heads=P).inner_attention.build()
    inner.to_empty(device="cpu")
    for parameter in inner.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    inner.init_states(buffer_device=torch.device("cpu"))
    eye = torch.eye(inner.num_kv_heads)
    torch.testing.assert_close(inner.alpha_v.mean(-1), eye)
    torch.testing.assert_close(inner.collapse[..., -1], torch.eye(inner.num_heads))


def test_what_is_refused() -> None:
    layer = llama3.model_registry("debugmodel", attn_backend="varlen").model.layers[0].attention
    inner = dataclasses.replace(layer.inner_attention, window_size=(8, 0))
    with pytest.raises(ValueError, match=r"without window_size.*\(8, 0\)"):
        interleaved(dataclasses.replace(layer, inner_attention=inner))
    other = llama3.model_registry("debugmodel", attn_backend="flex").model.layers[0].attention
    with pytest.raises(ValueError, match=r"attn_backend=.varlen."):
        interleaved(other)
