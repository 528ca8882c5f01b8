"""An upcycled model is saved and loaded by transformers' own means."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import iha
import iha.hf
from tests.hf.families import inputs, tiny

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
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".py", ".safetensors"}
    for how in ({"imports": "import iha.hf"}, {"arguments": ", trust_remote_code=True"}):
        found, printed = read_in_a_new_process(tmp_path, given, auto, **how)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
        assert type(model).__name__ in printed


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
    assert {p.dtype for p in iha.mixing_parameters(loaded)} == {dtype}
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
