"""An upcycled model is saved and loaded by transformers' own means."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)

import iha
import iha.hf
from tests.hf.families import DECODER, inputs, moved, tiny, tiny_llava

READ = """
import sys, torch
{imports}
from transformers import {auto}
model = {auto}.from_pretrained(sys.argv[1]{arguments}).eval()
given = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(**given).logits, sys.argv[3])
print(type(model).__module__, type(model).__name__)
"""


def read_in_a_new_process(
    folder: Path, given: dict[str, Any], auto: str, imports: str = "", arguments: str = ""
) -> tuple[torch.Tensor, str]:
    torch.save(given, folder / "given.pt")
    script = READ.format(imports=imports, auto=auto, arguments=arguments)
    command = [sys.executable, "-c", script, folder, folder / "given.pt", folder / "logits.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits.pt", weights_only=True), done.stdout


@pytest.mark.parametrize(
    ("family", "auto", "settings"),
    [
        ("llama", "AutoModelForCausalLM", {"pseudo_heads": {0: 2, 2: 3}, "rope": "fractional"}),
        ("mistral", "AutoModelForCausalLM", {"pseudo_heads": 2, "rope": "virtual", "window": 3}),
        ("bert", "AutoModelForMaskedLM", {"pseudo_heads": 2, "per_head_collapse": True}),
    ],
)
def test_a_new_process_gives_back_the_model(
    family: str, auto: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """After `import iha.hf`, and for a program that knows only transformers."""
    model = iha.upcycle(tiny(family), init="scratch", **settings)
    given = inputs(family)
    with torch.no_grad():
        expected = model(**given).logits
    model.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".md", ".py", ".safetensors"}
    for how in ({"imports": "import iha.hf"}, {"arguments": ", trust_remote_code=True"}):
        found, printed = read_in_a_new_process(tmp_path, given, auto, **how)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
        assert type(model).__name__ in printed


HIDDEN = """
import sys, torch, transformers
folder, given, *autos = sys.argv[1:]
given = torch.load(given, weights_only=True)
for name in autos:
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
    text = getattr(model.base_model, "language_model", model.base_model)
    with torch.no_grad():
        difference = (text(given["ids"]).last_hidden_state - given["expected"]).abs().max()
    print("FOUND", name, type(model).__name__, difference.item())
"""


@pytest.mark.parametrize("family", ["llama", "llava", "llava's text model by itself"])
def test_every_auto_class_brings_iha(family: str, tmp_path: Path) -> None:
    """Also where a causal LM was saved, and where only the text model of a VLM was upcycled.

    transformers' own LlamaForQuestionAnswering names its base model otherwise and finds no weights
    of any Llama.
    """
    if family == "llama":
        model = moved(iha.upcycle(tiny("llama"), 2))
        text = model.model
    elif family == "llava":
        model = moved(iha.upcycle(tiny_llava(), 2, ["language_model.*"]))
        text = model.model.language_model
    else:
        model = tiny_llava()
        text = moved(iha.upcycle(model.model.language_model, 2))
    ids = inputs("llama")["input_ids"][:1]
    with torch.no_grad():
        expected = text(ids).last_hidden_state
    model.save_pretrained(tmp_path)
    torch.save({"ids": ids, "expected": expected}, tmp_path / "given.pt")
    autos = {*model.config.auto_map} - {"AutoModelForQuestionAnswering"}
    assert len(autos) == 4
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, tmp_path, tmp_path / "given.pt", *sorted(autos)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert {auto for _, auto, _, _ in found} == autos
    assert all(float(difference) == 0 for *_, difference in found), found


# Their checkpoints are not as the modules are: renamed, or an expert's matrices each by itself.
@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "qwen3_moe", "llama4", "vit", "llava"])
def test_a_loaded_checkpoint_is_converted_as_its_base_models(family: str, tmp_path: Path) -> None:
    model = tiny_llava() if family == "llava" else tiny(family)
    model.save_pretrained(tmp_path / "plain")
    cls = type(model)
    model = cls.from_pretrained(tmp_path / "plain").eval()
    kept = set(load_file(tmp_path / "plain" / "model.safetensors"))
    moved(iha.upcycle(model, 2, ["*language_model*"] if family == "llava" else None))
    model.save_pretrained(tmp_path / "iha")
    saved = set(load_file(tmp_path / "iha" / "model.safetensors"))
    assert {name for name in saved if ".head_mixing." not in name} == kept
    again, report = cls.from_pretrained(tmp_path / "iha", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    weights = again.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_a_program_that_does_not_know_iha_refuses_to_load(tmp_path: Path) -> None:
    """It gets no plain model, and the error says what to do."""
    iha.upcycle(tiny("llama"), 2).save_pretrained(tmp_path / "llama")
    vlm = iha.upcycle(tiny_llava(), 2, ["language_model.*"])
    vlm.save_pretrained(tmp_path / "llava")
    vlm.model.language_model.save_pretrained(tmp_path / "text")
    part = tiny_llava()
    iha.upcycle(part.model.language_model, 2)
    part.save_pretrained(tmp_path / "part")
    iha.upcycle(tiny("mixtral"), 2).save_pretrained(tmp_path / "mixtral")
    script = """
import sys, transformers
from pathlib import Path
for name in ("llama", "llava", "text", "part", "mixtral"):
    auto = "ImageTextToText" if name in ("llava", "part") else "CausalLM"
    attention = ({"attn_implementation": name} for name in ("sdpa", "eager"))
    both = {"attn_implementation": "sdpa", "experts_implementation": "eager"}
    for own in ({}, *attention, both):
        load = getattr(transformers, "AutoModelFor" + auto).from_pretrained
        try:
            load(Path(sys.argv[1], name), **own)
        except ValueError as error:
            print("REFUSED", error)
"""
    command = [sys.executable, "-c", script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.count("REFUSED") == 20, done.stderr
    assert done.stdout.count("needs `import iha.hf` or trust_remote_code=True") == 20


@torch.no_grad()
def test_a_part_of_a_model_saved_by_itself(tmp_path: Path) -> None:
    """And the whole, of which only that part was upcycled."""
    whole = tiny_llava()
    text = moved(iha.upcycle(whole.model.language_model, 2))
    ids = inputs("llama")["input_ids"][:1]
    expected = text(ids).last_hidden_state
    text.save_pretrained(tmp_path / "text")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "text")(ids)[0], expected)
    whole.save_pretrained(tmp_path / "whole")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    assert torch.equal(loaded.model.language_model(ids)[0], expected)


@torch.no_grad()
def test_the_decoder_of_an_encoder_decoder_alone(tmp_path: Path) -> None:
    model = moved(iha.upcycle(tiny("bart"), 2))
    model.save_pretrained(tmp_path)
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path)
    mixed = {n: p for n, p in decoder.named_parameters() if "head_mixing" in n}
    assert len(mixed) == 2 * 2 * 4  # layers, self and cross attention, tensors
    for name, tensor in mixed.items():
        assert torch.equal(tensor, model.get_parameter(name)), name


def test_text_classes_of_a_composite_config_take_the_text_config() -> None:
    """As auto classes do for transformers' own classes, and not for those of remote code."""
    text = {**DECODER, "num_local_experts": 2, "intermediate_size_mlp": 32, "head_dim": 8}
    config = transformers.Llama4Config(text_config=text)
    model = iha.hf.model_class("Llama4ForCausalLM")._from_config(config)
    assert model.config is config.get_text_config()


MINE = """
import torch
from torch import nn
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.post_init()

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.gain
        return output
"""


def test_a_model_with_code_of_its_own_keeps_it(tmp_path: Path) -> None:
    source = tmp_path / "mine"
    source.mkdir()
    (source / "modeling_mine.py").write_text(MINE)
    (source / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\n\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    auto_map = {
        "AutoConfig": "configuration_mine.MineConfig",
        "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
    }
    settings = {**DECODER, "model_type": "mine", "auto_map": auto_map}
    (source / "config.json").write_text(json.dumps(settings))
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    moved(iha.upcycle(model, 2)).save_pretrained(tmp_path / "saved")
    given = inputs("llama")
    with torch.no_grad():
        expected = model(**given).logits
    found, printed = read_in_a_new_process(
        tmp_path / "saved",
        given,
        "AutoModelForCausalLM",
        "import iha.hf",
        ", trust_remote_code=True",
    )
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert "modeling_mine MineForCausalLM" in printed


QUERIES = "pseudo_queries"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pseudo_heads": {}}, r"pseudo_heads must map .* got {}"),
        ({"pseudo_heads": []}, r"pseudo_heads must map .* got \[\]"),
        ({"pseudo_heads": "x"}, r"pseudo_heads must map .* got 'x'"),
        ({"pseudo_heads": {"layers.0.self_attn": 0}}, "pseudo_heads must be at least 1, got 0"),
        ({"pseudo_heads": {"layers.0.self_attn": "2"}}, "pseudo_heads must be an integer"),
        ({"pseudo_heads": {"layers.0.self_attn": True}}, "pseudo_heads must be an integer"),
        (
            {key: {"layers.9.self_attn": 2} for key in ("pseudo_heads", "pseudo_queries")},
            r"the layer 'layers\.9\.self_attn', which",
        ),
        (
            {key: {"layers.0.self_attn": 2} for key in ("pseudo_heads", "pseudo_queries")},
            r"mixing tensors of 'model\.layers\.[12]\.",
        ),
        ({"pseudo_queries": {"layers.0.self_attn": 1}}, "pseudo_queries must name the layers that"),
        ({"pseudo_queries": 1}, "pseudo_queries must name the layers that .* got 1"),
        ({"rope": "Token"}, "rope must be one of .* got 'Token'"),
        ({"rope": None}, "rope must be one of .* got None"),
        ({"causal": None}, "causal must be one of .* got None"),
        ({"causal": ["flat"]}, r"causal must be one of .* got \['flat'\]"),
        ({"rotary": 1}, "rotary must be one of .* got 1"),
        ({"rotary_start": -1}, "rotary_start must be at least 0, got -1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 2.0}, "window must be an integer"),
        ({"init": "zeros"}, "init must be one of .* got 'zeros'"),
        ({"per_head_collapse": "no"}, "per_head_collapse must be True or False"),
        ({"backend": "fast"}, "backend must be one of .* got 'fast'"),
        (
            {k: {f"layers.{n}.self_attn": 3 for n in range(3)} for k in ("pseudo_heads", QUERIES)},
            r"has the shape .* 2\), and .* makes it .* 3\) \(pseudo_heads",
        ),
        (
            {QUERIES: {f"layers.{n}.self_attn": 1 for n in range(3)}},
            r"has the shape \(4, 4, 2\), and .* makes it \(4, 4, 1\)",
        ),
        ({"per_head_collapse": True}, r"has the shape \(4, 4, 2\), and .* makes it \(4, 2\)"),
        (
            {"base_model": "MistralModel"},
            "is of a MistralModel, and the model's base is a LlamaModel",
        ),
        ({"base_model": "Llama"}, "is of a Llama, and the model's base is a LlamaModel"),
        ({"base_model": 3}, "base_model must be the name of a class, got 3"),
        ({"unrotated": ["layers.9.self_attn"]}, "unrotated must list layers that"),
        ({"unrotated": "layers"}, "unrotated must list layers that"),
        ({"pseudo": 3, "heads": 2}, "it has the unknown 'pseudo', 'heads'"),
        ({"version": 2}, "its version must be 1, got 2"),
        ({"version": None}, "its version must be 1, got None"),
    ],
)
def test_a_damaged_entry_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["iha"] |= change
    damage(folder, tmp_path, config)
    with pytest.raises(ValueError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "the entry 'iha' of config.json" in str(error.value)


@pytest.mark.parametrize("key", ["pseudo_heads", "rope", "window", "base_model", "unrotated"])
def test_an_entry_that_lacks_something_is_refused(key: str, tmp_path: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["iha"][key]
    damage(folder, tmp_path, config)
    with pytest.raises(ValueError, match=f"the entry 'iha' of config.json .* it lacks '{key}'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("entry", ["IHA", [1], 7])
def test_an_entry_that_is_no_mapping_is_refused(entry: Any, tmp_path: Path, folder: Path) -> None:
    damage(folder, tmp_path, json.loads((folder / "config.json").read_text()) | {"iha": entry})
    with pytest.raises(ValueError, match=r"the entry 'iha' of config.json .* it must be a mapping"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("entry", [{}, {"iha": None}])
def test_a_config_without_its_entry_gives_no_plain_model(
    entry: dict[str, Any], tmp_path: Path, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["iha"]
    damage(folder, tmp_path, config | entry)
    with pytest.raises(
        ValueError, match=r"has mixing tensors of 'model.layers.*, or there is none"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="asks for IHA and has no entry 'iha'"):
        model(**inputs("llama"))
    # The config of the model before it was upcycled.
    (tmp_path / "config.json").write_text(tiny("llama").config.to_json_string())
    with pytest.raises(
        ValueError, match=r"has mixing tensors of 'model.layers.*, or there is none"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    iha.upcycle(tiny("llama"), 2).save_pretrained(folder)
    return folder


def damage(folder: Path, target: Path, config: dict[str, Any]) -> None:
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))


def test_what_numpy_counted_is_saved_as_numbers(tmp_path: Path) -> None:
    P = np.int64(2)
    model = iha.upcycle(tiny("llama"), {0: P, 1: np.int32(3)}, [np.int64(0), 1], window=np.int64(4))
    model.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["iha"]
    assert entry["pseudo_heads"] == {"layers.0.self_attn": 2, "layers.1.self_attn": 3}
    assert entry["window"] == 4


def test_a_model_upcycled_in_memory_is_not_loaded_again_by_its_name(tmp_path: Path) -> None:
    """Trainers that load a reference model by it (TRL's) would get the plain checkpoint."""
    tiny("llama").save_pretrained(tmp_path / "plain")
    model = iha.upcycle(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), 2)
    with pytest.raises(OSError, match="upcycled in memory: save it, and load that"):
        AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config._name_or_path == str(tmp_path / "saved")


def test_the_folder_holds_a_readable_record_and_no_model_code(tmp_path: Path) -> None:
    iha.upcycle(tiny("llama"), {1: 2}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["iha"]["pseudo_heads"] == {"layers.1.self_attn": 2}
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_iha.LlamaForCausalLM"
    assert config["model_type"] == "llama"
    assert len((tmp_path / "modeling_iha.py").read_text().splitlines()) < 20


def test_saving_what_was_loaded_keeps_everything(tmp_path: Path) -> None:
    model = iha.upcycle(tiny("llama"), 2, init="scratch")
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    for name, tensor in model.state_dict().items():
        assert torch.equal(last.state_dict()[name], tensor), name
    assert type(last) is type(model)
    assert last.config.iha == model.config.iha
    assert (tmp_path / "second" / "modeling_iha.py").exists()


def test_the_original_class_and_other_models_are_untouched(tmp_path: Path) -> None:
    iha.upcycle(tiny("llama"), 2)
    plain = tiny("llama")
    assert type(plain).__module__.startswith("transformers.")
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any("head_mixing" in name for name, _ in loaded.named_parameters())
    assert loaded.config._attn_implementation != "iha"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_in_another_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    iha.upcycle(tiny("llama"), 2).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in iha.mixing_parameters(loaded)} == {torch.float32}
    assert loaded(**inputs("llama")).logits.dtype == dtype


def test_the_base_model_alone_is_found_too(tmp_path: Path) -> None:
    model = iha.upcycle(tiny("llama"), 2, init="scratch")
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    given = inputs("llama")
    with torch.no_grad():
        expected = model.model(**given).last_hidden_state
        assert torch.equal(base(**given).last_hidden_state, expected)


def test_the_base_model_saved_by_itself(tmp_path: Path) -> None:
    model = iha.upcycle(tiny("llama"), 2, init="scratch").model
    given = inputs("llama")
    with torch.no_grad():
        expected = model(**given).last_hidden_state
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_iha.py").exists()
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(loaded(**given).last_hidden_state, expected)


@torch.no_grad()
def test_hidden_states_are_there_before_and_after(tmp_path: Path) -> None:
    """transformers collects them by class, and an upcycled model changes its own."""
    model = iha.upcycle(tiny("llama"), 2, init="scratch")
    model.save_pretrained(tmp_path)
    given = {**inputs("llama"), "output_hidden_states": True}
    expected = model(**given).hidden_states
    assert len(expected) == 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    base = iha.upcycle(tiny("llama").model, 2)
    base.load_state_dict(model.model.state_dict())
    for other in (loaded, base):
        for found, wanted in zip(other(**given).hidden_states, expected, strict=True):
            assert torch.equal(found, wanted)


def test_an_encoder_decoder_comes_back(tmp_path: Path) -> None:
    model = iha.upcycle(tiny("bart"), {"decoder.*.self_attn": 2, "encoder.*": 3}, init="scratch")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    given = inputs("bart")
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, model(**given).logits)
    assert len(loaded.config.iha["pseudo_heads"]) == 4


def test_tensors_missing_from_a_checkpoint_start_as_the_config_says(tmp_path: Path) -> None:
    """A plain checkpoint, and a config that asks for IHA: exact, not memory's leftovers."""
    original = tiny("llama")
    config = iha.upcycle(tiny("llama"), 3).config
    original.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    given = inputs("llama")
    mask = given["attention_mask"].bool()
    with torch.no_grad():
        difference = (model(**given).logits - original(**given).logits)[mask]
    assert difference.abs().max() < 2e-5


def test_fewer_pseudo_queries_are_saved_and_unread_ones_can_go(tmp_path: Path) -> None:
    plain, model = tiny("llama"), iha.upcycle(tiny("llama"), {0: 3, 2: 2}, pseudo_queries={0: 2})
    given = inputs("llama")
    with torch.no_grad():
        expected = model(**given).logits
        torch.testing.assert_close(expected, plain(**given).logits, atol=2e-5, rtol=0)
    kept = iha.drop_unread_queries(model)
    assert kept == {"layers.0.self_attn": 1, "layers.2.self_attn": 1}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.layers[0].self_attn.head_mixing.alpha_q.shape == (4, 4, 1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**given).logits, expected, atol=2e-5, rtol=0)


def test_a_model_card_lies_beside_the_model(tmp_path: Path) -> None:
    """It is written anew while it is ours, and never over a text of the user's."""
    card = tmp_path / "README.md"
    iha.upcycle(tiny("llama"), 2, pseudo_queries=1).save_pretrained(tmp_path)
    iha.upcycle(tiny("llama"), {0: 3, 2: 3}, causal="token").save_pretrained(tmp_path)
    loaded = ModelCard.load(card)
    assert (loaded.data.library_name, loaded.data.tags) == (
        "transformers",
        ["interleaved-head-attention"],
    )
    for said in ("| 3 | 3 | `layers.[0, 2].self_attn` |", "causal: token", "vllm"):
        assert said in loaded.text
    assert "| 2 | 1 |" not in loaded.text
    code = re.search(r"```python\n(.*?)```", loaded.text, re.DOTALL)
    assert code is not None
    found: dict[str, Any] = {"path": tmp_path}
    exec(code[1], found)
    assert found["model"].model.layers[2].self_attn.head_mixing.pseudo_heads == 3
    card.write_text("mine")
    iha.upcycle(tiny("llama"), 2).save_pretrained(tmp_path)
    assert card.read_text() == "mine"


@pytest.mark.parametrize(
    ("family", "layers", "row"),
    [
        ("llama", None, "| 2 | 2 | `layers.[0-3].self_attn` |"),
        ("llama", {0: 2, 1: 2, 3: 2}, "| 2 | 2 | `layers.[0-1, 3].self_attn` |"),
        ("llama", {1: 2}, "| 2 | 2 | `layers.1.self_attn` |"),
        (
            "bart",
            None,
            "| 2 | 2 | `encoder.layers.[0-1].self_attn`, `decoder.layers.[0-1].self_attn`,"
            " `decoder.layers.[0-1].encoder_attn` |",
        ),
    ],
)
def test_the_model_card_groups_equal_layers(
    family: str, layers: dict[int, int] | None, row: str, tmp_path: Path
) -> None:
    more = {"num_hidden_layers": 4} if family == "llama" else {}
    iha.upcycle(tiny(family, **more), layers or 2).save_pretrained(tmp_path)
    assert row in (tmp_path / "README.md").read_text()


def test_a_plain_model_gets_no_card_of_ours(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
