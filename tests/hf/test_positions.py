"""Phases turn what the model turns, by its rotary module of the moment, wherever weights are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import iha
import iha.hf
from iha.hf.attention import iha_attention
from iha.hf.sequences import layer_attention
from iha.rotary import phase_tables, rotate
from tests.hf.families import DECODER, inputs, moved, tiny, trained

LATENT = {
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 9, "n_routed_experts": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2ForCausalLM", LATENT),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT),
    "deepseek_v3_halves": ("DeepseekV3ForCausalLM", {**LATENT, "rope_interleave": False}),
    "cohere2": ("Cohere2ForCausalLM", {"layer_types": SLIDING, "sliding_window": 4}),
    "exaone4": ("Exaone4ForCausalLM", {"layer_types": SLIDING, "sliding_window": 4}),
    "helium": ("HeliumForCausalLM", {"head_dim": 8}),
}


def build(family: str, **changes: Any) -> Any:
    if family not in MODELS:
        return tiny(family, **changes)
    name, settings = MODELS[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**DECODER, **settings, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


def first_call(model: Any, **given: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(query, key, keyword arguments) with which the model calls its first mixing."""
    mixing = next(m for m in model.modules() if isinstance(m, iha.HeadMixing))
    seen: list[Any] = []
    hook = mixing.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args[:2], kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(**given)
    hook.remove()
    return seen[0]


ROTATED = [*MODELS, "llama", "gpt_neox", "glm4", "phi", "smollm3", "gemma3", "olmo3"]


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        *((family, "virtual") for family in ROTATED),
        *((family, "fractional") for family in [*ROTATED, "llama4"]),
    ],
)
def test_a_phase_is_what_the_model_does_at_another_position(family: str, rope: Any) -> None:
    """Scores of turned queries and keys, against a model whose tokens stand at p and p + n·P."""
    P, N, layer = 3, 4, 0
    ids = torch.randint(3, 99, (1, N))
    model = iha.upcycle(build(family), P, [layer], rope=rope)
    query, key, arguments = first_call(model, input_ids=ids)

    def scores(queries: list[torch.Tensor], keys: list[torch.Tensor]) -> torch.Tensor:
        key = torch.stack(keys).repeat_interleave(query.shape[1] // keys[0].shape[1], dim=2)
        return torch.einsum("pbhnd,qbhsd->bhnpsq", torch.stack(queries), key)

    cos, sin = arguments["phase"]
    turned = [
        [rotate(x, (cos[p], sin[p]), arguments["rotary"]) for p in range(P)] for x in (query, key)
    ]
    plain = iha.upcycle(build(family), 1, [layer])
    if rope == "fractional":  # positions in units of 1/P, so that they are whole numbers
        for name, frequencies in plain.named_buffers():
            if name.endswith("inv_freq"):
                frequencies /= P
    expected: list[list[torch.Tensor]] = [[], []]
    for p in range(P):
        positions = torch.arange(N)[None] * P + p
        at_p = first_call(plain, input_ids=ids, position_ids=positions)
        for found, tensor in zip(expected, at_p, strict=False):
            found.append(tensor)
    torch.testing.assert_close(scores(*turned), scores(*expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "unrotated"), [("cohere2", [1]), ("exaone4", [1]), ("smollm3", [1]), ("llama", [])]
)
def test_layers_that_the_model_does_not_rotate_have_no_phases(
    family: str, unrotated: list[int], tmp_path: Path
) -> None:
    """Whether a layer says it (SmolLM3) or not; found once, and kept in the folder."""
    model = moved(iha.upcycle(build(family), 2, rope="fractional"))
    assert model.config.iha["unrotated"] == [f"layers.{n}.self_attn" for n in unrotated]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for one in (model, loaded):
        phases = [layer.self_attn.iha.phase(torch.device("cpu")) for layer in one.model.layers]
        assert [n for n, phase in enumerate(phases) if phase is None] == unrotated
    ids = torch.randint(3, 99, (1, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_latent_attention_comes_back_from_a_folder(tmp_path: Path) -> None:
    model = moved(iha.upcycle(build("deepseek_v3"), 2, rope="fractional"))
    assert model.config.iha["rotary_start"] == 8
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(3, 99, (1, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_sequences_of_serving_engines_turn_the_same_dimensions() -> None:
    model = moved(iha.upcycle(build("deepseek_v3"), 2, rope="fractional"))
    attention = model.model.layers[1].self_attn
    query, key, value = torch.randn(3, 1, 4, 6, 16)
    expected, _ = iha_attention(attention, query, key, value, None, scaling=0.3)
    attend = layer_attention(
        attention.head_mixing, attention.iha,
        device=query.device, sliding_window=None, scale=0.3, softcap=None,
    )  # fmt: skip
    torch.testing.assert_close(attend(query, key, value, None).transpose(1, 2), expected)


def test_models_whose_positions_cannot_be_turned() -> None:
    model = tiny("bert")
    why = "needs one rotary module that has inv_freq .* has 0.*use rope='token'"
    with pytest.raises(ValueError, match=f"rope='virtual' {why}"):
        iha.upcycle(model, 2, rope="virtual")
    assert getattr(model.config, "iha", None) is None


def test_frequencies_that_change_with_the_length_are_refused() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match=r"rope='fractional' needs frequencies .* \(dynamic\)"):
        iha.upcycle(tiny("llama", rope_parameters=scaling), 2, rope="fractional")


def test_attention_that_is_no_rotation_of_its_queries_is_refused() -> None:
    """A weighted norm after the rotation: no phase takes one position to the next."""
    model = transformers.HunYuanDenseV1ForCausalLM(
        transformers.HunYuanDenseV1Config(**DECODER, head_dim=8)
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.query_layernorm.weight.copy_(torch.linspace(0.2, 2, 8))
    with pytest.raises(ValueError, match=r"rope='virtual' needs queries and keys that a rotation"):
        iha.upcycle(model, 2, rope="virtual")


def test_layers_that_are_not_told_their_positions_have_no_virtual_ones() -> None:
    model = iha.upcycle(tiny("llama4"), 2, rope="virtual")
    with pytest.raises(ValueError, match="rope='virtual' needs Llama4TextAttention to be given"):
        model(**inputs("llama4"))


# The rotary module of the moment.


def other_positions(**changes: Any) -> LlamaRotaryEmbedding:
    parameters = {"rope_type": "default", "rope_theta": 100.0, **changes}
    return LlamaRotaryEmbedding(LlamaConfig(**DECODER, rope_parameters=parameters))


@torch.no_grad()
@pytest.mark.parametrize("rope", ["token", "virtual", "fractional"])
def test_a_rotary_module_that_takes_the_place_of_the_first_counts(rope: Any) -> None:
    ids = torch.randint(3, 99, (1, 9))
    before = trained("llama", 2, rope=rope)
    plain = tiny("llama")
    plain.model.rotary_emb = other_positions()
    expected = moved(iha.upcycle(plain, 2, rope=rope))(ids).logits
    assert (before(ids).logits - expected).abs().max() > 0.01
    for model in (copy.deepcopy(before), before):
        model.model.rotary_emb = other_positions()
        assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "olmo3"])
def test_layers_of_different_types_have_phases_of_their_own(family: str) -> None:
    """One rotary module has the frequencies of sliding and of global layers."""
    model = iha.upcycle(tiny(family, layer_types=SLIDING), 2, rope="fractional")
    rotary, phases = model.model.rotary_emb, {}
    for layer, kind in zip(model.model.layers, model.config.layer_types, strict=True):
        phases[kind] = layer.self_attn.iha.phase(torch.device("cpu"))
        expected = phase_tables(2, getattr(rotary, f"{kind}_inv_freq"), "fractional")
        assert torch.equal(phases[kind][1], expected[1])
    assert len(phases) == 2


@torch.no_grad()
def test_a_copy_has_the_rotary_module_of_the_copy() -> None:
    model = trained("llama", 2, rope="fractional")
    twin = copy.deepcopy(model)
    twin.model.rotary_emb = other_positions()
    attention = model.model.layers[0].self_attn
    here, there = (m.model.layers[0].self_attn.iha.phase("cpu") for m in (model, twin))
    assert not torch.equal(here[0], there[0])
    alone = copy.deepcopy(attention)
    model.model.rotary_emb = other_positions()
    assert torch.equal(alone.iha.phase("cpu")[0], there[0])


# On the meta device, and offloaded.


@torch.no_grad()
@pytest.mark.parametrize("rope", ["token", "virtual", "fractional"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_upcycling_on_the_meta_device(family: str, rope: Any) -> None:
    ids = torch.randint(3, 99, (1, 9))
    real = moved(iha.upcycle(build(family), 2, rope=rope))
    cls = getattr(transformers, type(real).__name__)
    with torch.device("meta"):
        empty = iha.upcycle(cls(cls.config_class(**plain_config(real))), 2, rope=rope)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert empty.config.iha == real.config.iha
    empty.load_state_dict(real.state_dict(), assign=True)
    empty.model.rotary_emb = copy.deepcopy(real.model.rotary_emb)
    for name, buffer in real.named_buffers():
        owner, _, last = name.rpartition(".")
        setattr(empty.get_submodule(owner), last, buffer.clone())
    assert torch.equal(empty.eval()(ids).logits, real(ids).logits)


def plain_config(model: Any) -> dict[str, Any]:
    dropped = ("iha", "auto_map", "attn_implementation", "architectures", "model_type", "dtype")
    return {k: v for k, v in model.config.to_dict().items() if k not in dropped}


@torch.no_grad()
@pytest.mark.parametrize("rope", ["token", "virtual", "fractional"])
def test_offloaded_models(rope: Any, tmp_path: Path) -> None:
    """Weights that are on the device only while their module runs: logits are equal."""
    given = inputs("llama")
    model = trained("llama", 2, rope=rope)
    expected = model(**given).logits
    model.save_pretrained(tmp_path / "model")
    for buffers in (False, True):
        offloaded = copy.deepcopy(model)
        accelerate.cpu_offload(offloaded, execution_device="cpu", offload_buffers=buffers)
        assert offloaded.model.layers[0].self_attn.head_mixing.alpha_q.is_meta
        assert torch.equal(offloaded(**given).logits, expected)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
              "model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
              "lm_head": "disk"}  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "off")
    )
    assert loaded.model.layers[1].self_attn.head_mixing.alpha_q.is_meta
    assert torch.equal(loaded(**given).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("rope", ["token", "virtual", "fractional"])
def test_upcycling_what_is_offloaded(rope: Any) -> None:
    given = inputs("llama")
    expected = trained("llama", 2, rope=rope)(**given).logits
    model = tiny("llama")
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    iha.upcycle(model, 2, rope=rope)
    moved(model)
    assert torch.equal(model(**given).logits, expected)
