"""torchtitan with IHA: against transformers on the same weights, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan")

from tests.torchtitan import cpu  # first: it tells torchtitan that there is no GPU

# isort: split
import torchtitan.models.llama3 as llama3
from torchtitan.components.optimizer import ParamGroupConfig, default_adamw
from torchtitan.models.common.attention import create_varlen_metadata_for_document
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import iha
from examples.torchtitan import configs
from iha.integrations.torchtitan import MIXING, InterleavedInner, interleaved, undecayed

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama3": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
P, TOKENS = 3, 32
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 4, "pseudo_queries": 2},
    {"causal": "token", "rope": "fractional", "per_head_collapse": True},
    {"rope": "virtual", "layers": [0, 2]},
]


def built(family: str, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    spec = cpu.spec(family)
    interleaved(spec.model, P, init="upcycle", **options)
    model = spec.model.build()
    model.init_states()
    with torch.no_grad():
        for parameter in iha.mixing_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return spec, model


def plain_in_transformers(family: str) -> Any:
    config, (kind, model) = cpu.spec(family).model, FAMILIES[family]
    attention, feed_forward = config.layers[0].attention, config.layers[0].feed_forward
    return model(
        kind(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=feed_forward.w1.out_features,
            num_hidden_layers=len(config.layers),
            num_attention_heads=attention.n_heads,
            num_key_value_heads=attention.n_kv_heads or attention.n_heads,
            head_dim=attention.head_dim or config.dim // attention.n_heads,
            rms_norm_eps=config.norm.eps or torch.finfo(torch.float32).eps,
            rope_parameters={"rope_type": "default", "rope_theta": attention.rope.theta},
            tie_word_embeddings=config.enable_weight_tying,
            max_position_embeddings=128,
        )
    )


def load_strictly(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Folders of models whose output is their embedding have that tensor once."""
    if model.config.tie_word_embeddings:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    model.load_state_dict(tensors, strict=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_what_transformers_makes_of_them(
    family: str, options: dict[str, Any]
) -> None:
    spec, model = built(family, **options)
    adapter = spec.state_dict_adapter(spec.model, None)
    exported = adapter.to_hf(model.state_dict())
    theirs = iha.upcycle(plain_in_transformers(family), P, **options)
    load_strictly(theirs, exported)
    ids = torch.randint(3, 2000, (1, TOKENS))
    positions = torch.cat([torch.arange(20), torch.arange(TOKENS - 20)])[None]
    masks = create_varlen_metadata_for_document(positions)
    found = model(ids, positions=positions, attention_masks=masks)
    wanted = theirs(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-4)

    found.square().mean().backward()
    wanted.square().mean().backward()
    gradients = adapter.to_hf({name: p.grad for name, p in model.named_parameters()})
    for name, parameter in theirs.named_parameters():
        if "head_mixing" in name:
            assert gradients[name].abs().max() > 0
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3)

    back = adapter.from_hf(exported)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_mixing_tensors_are_saved_in_the_file_of_their_layer(tmp_path: Path) -> None:
    names = plain_in_transformers("llama3").state_dict()
    numbers = {name: int("".join(filter(str.isdigit, name)) or 0) for name in names}
    files = {name: f"model-{number:05}-of-00003.safetensors" for name, number in numbers.items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    spec, _ = built("llama3", layers=[0, 2])
    found = spec.state_dict_adapter(spec.model, str(tmp_path)).fqn_to_index_mapping
    mixing = {
        f"model.layers.{i}.self_attn.head_mixing.{name}": i for i in (0, 2) for name in MIXING
    }
    assert found == numbers | mixing


def test_a_model_that_was_built_empty_starts_exactly() -> None:
    config = cpu.spec("llama3").model
    interleaved(config, P, init="upcycle")
    with torch.device("meta"):
        inner = config.layers[0].attention.inner_attention.build()
    inner.to_empty(device="cpu")
    for parameter in inner.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    inner.init_states(buffer_device=torch.device("cpu"))
    torch.testing.assert_close(inner.alpha_v.mean(-1), torch.eye(inner.num_kv_heads))
    torch.testing.assert_close(inner.collapse[..., -1], torch.eye(inner.num_heads))


def test_the_papers_model() -> None:
    config = configs.paper()
    (_, options), _ = config.override.imports
    model = config.model_spec.model
    interleaved(model, **options)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in model.build().parameters())
    schedule = iha.hybrid_schedule(26, 8192, 20)
    mixed = [
        isinstance(one.attention.inner_attention, InterleavedInner.Config) for one in model.layers
    ]
    assert tuple(i for i, here in enumerate(mixed) if here) == schedule.layers
    assert model.layers[0].attention.inner_attention.options["window"] == schedule.window == 10
    assert (
        parameters
        == 26 * (4 * 2560**2 + 3 * 2560 * 6912 + 2 * 2560) + 2560 + 128256 * 2560 + 21 * 4 * 20**3
    )


def test_mixing_tensors_do_not_decay() -> None:
    plain, own = default_adamw(lr=1e-3), undecayed(default_adamw(lr=1e-3), lr=2e-3)
    _, model = built("llama3")
    groups = [
        group
        for optimizer in own.build(model_parts=[model]).optimizers
        for group in optimizer.param_groups
    ]
    mixing = {id(p) for p in iha.mixing_parameters(model)}
    assert {id(p) for p in groups[0]["params"]} == mixing
    assert (groups[0]["weight_decay"], groups[0]["lr"]) == (0, 2e-3)
    assert groups[1]["weight_decay"] == plain.param_groups[0].optimizer_kwargs["weight_decay"] > 0
    assert len(groups[1]["params"]) == sum(1 for _ in model.parameters()) - len(mixing)
    muon = dataclasses.replace(
        plain, param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="DistMuon")]
    )
    with pytest.raises(ValueError, match="for Adam or AdamW"):
        undecayed(muon)


def test_what_is_refused() -> None:
    config = cpu.spec("llama3").model
    inner = config.layers[1].attention.inner_attention
    config.layers[1].attention.inner_attention = dataclasses.replace(inner, window_size=(8, 0))
    with pytest.raises(ValueError, match=r"layer 1 needs .* without window_size.*\(8, 0\)"):
        interleaved(config, P, init="upcycle")
    interleaved(config, P, init="upcycle", layers=[0])
    kept = config.layers[2].attention
    with pytest.raises(ValueError, match=r"layer 0 .* over InterleavedInner"):
        interleaved(config, P, init="upcycle", layers=[2, 0])
    assert config.layers[2].attention is kept
    flex = llama3.model_registry("debugmodel", attn_backend="flex").model
    with pytest.raises(ValueError, match=r"attn_backend=.varlen.*FlexAttention"):
        interleaved(flex, P, init="upcycle")
    with pytest.raises(TypeError, match="init"):
        interleaved(flex, P)
    with pytest.raises(ValueError, match="pattern sets layers and window"):
        interleaved(config, P, init="upcycle", pattern="SSSSL", window=3)
    with pytest.raises(ValueError, match="seq_len must be at least"):
        interleaved(config, 20, init="upcycle", pattern="SSSSL")
