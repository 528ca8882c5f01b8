"""torchtitan's trainer with IHA by the command line's words, in processes of its own, on CPUs."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan")

from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import iha
from tests.torchtitan.cpu import Seen, batch, run
from tests.torchtitan.test_torchtitan import load_strictly, plain_in_transformers

OPTIONS: dict[str, dict[str, Any]] = {
    "llama3": {"pseudo_heads": 2, "init": "scratch", "rope": "virtual", "pattern": "SSL"},
    "qwen3": {"pseudo_heads": 3, "init": "scratch", "rope": "fractional", "window": 5},
}
TENSOR = ["--parallelism.tensor_parallel_degree", "2"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "fsdp": (2, ["--training.local_batch_size", "1"]),
    "tensor parallel": (2, [*TENSOR, "--debug.spmd_typechecking"]),
    "tensor parallel, DTensors": (2, [*TENSOR, "--parallelism.spmd_backend", "partial_dtensor"]),
    "tensor parallel and fsdp": (4, [*TENSOR, "--training.local_batch_size", "1"]),
    "compiled blocks": (1, ["--compile.enable"]),
}


def words(family: str, options: dict[str, Any] | None = None) -> list[str]:
    module = "iha.integrations.torchtitan"
    given = f"{module}.interleaved={json.dumps(options or OPTIONS[family])}"
    return ["--config", family, "--override.imports", given, f"{module}.undecayed"]


@functools.cache
def unsharded(family: str, folder: Path) -> Seen:
    return run(words(family), folder)


@pytest.mark.parametrize(
    ("family", "layout"),
    [*(("llama3", layout) for layout in LAYOUTS), ("qwen3", "fsdp"), ("qwen3", "tensor parallel")],
)
def test_losses_gradients_and_weights_are_those_of_one_process(
    family: str, layout: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = unsharded(family, tmp_path_factory.getbasetemp())
    world, given = LAYOUTS[layout]
    found = run([*words(family), *given], tmp_path, world=world)
    assert any("inner_attention.alpha_q" in name for name in expected.gradients)
    torch.testing.assert_close(found.losses, expected.losses, atol=1e-4, rtol=1e-5)
    for ours, theirs in (
        (found.gradients, expected.gradients),
        (found.parameters, expected.parameters),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_a_run_that_is_resumed_is_the_run(tmp_path: Path) -> None:
    given = [*words("llama3"), "--training.steps", "4", "--checkpoint.enable"]
    given += ["--checkpoint.interval", "2", "--checkpoint.folder", "kept"]
    whole = run(given, tmp_path)
    shutil.rmtree(next(tmp_path.glob("**/step-4")))
    rest = run(given, tmp_path, fill=False)
    assert rest.losses == whole.losses[2:]
    assert rest.parameters.keys() == whole.parameters.keys()
    assert all(torch.equal(rest.parameters[n], p) for n, p in whole.parameters.items())


EXACT = {"pseudo_heads": 3, "init": "upcycle"}
LOADED = ["--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--training.steps", "1"]


def loss_in_transformers(model: Any) -> float:
    ids, positions = batch(0, 2, 32)
    with torch.no_grad():
        logits = model(ids[:, :-1], position_ids=positions, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def test_what_the_trainer_saves_is_loaded_in_transformers(tmp_path: Path) -> None:
    saved = ["--checkpoint.enable", "--checkpoint.last_save_model_only"]
    seen = run([*words("qwen3", EXACT), *saved, "--checkpoint.last_save_in_hf"], tmp_path)
    (file,) = tmp_path.glob("**/step-3/*.safetensors")
    model = iha.upcycle(plain_in_transformers("qwen3"), 3)
    load_strictly(model, load_file(file))
    for i, layer in enumerate(model.model.layers):
        for name, tensor in layer.self_attn.head_mixing.named_parameters():
            mine = seen.parameters[f"layers.{i}.attention.inner_attention.{name}"]
            assert torch.equal(tensor, mine)


def test_a_folder_of_transformers_is_where_the_trainer_starts(tmp_path: Path) -> None:
    model = iha.upcycle(plain_in_transformers("llama3"), 3)
    with torch.no_grad():
        for parameter in iha.mixing_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "iha")
    given = [*LOADED, "--checkpoint.initial_load_path", str(tmp_path / "iha"), *TENSOR]
    seen = run([*words("llama3", EXACT), *given], tmp_path, world=2, fill=False)
    assert seen.losses[0] == pytest.approx(loss_in_transformers(model), abs=2e-5)


def test_a_plain_folder_is_upcycled_exactly_or_refused(tmp_path: Path) -> None:
    model = plain_in_transformers("llama3")
    model.save_pretrained(tmp_path / "plain")
    given = [*LOADED, "--checkpoint.initial_load_path", str(tmp_path / "plain")]
    seen = run([*words("llama3", EXACT), *given], tmp_path, fill=False)
    assert seen.losses[0] == pytest.approx(loss_in_transformers(model), abs=2e-5)
    other = EXACT | {"init": "scratch"}
    with pytest.raises(Exception, match="plain has no mixing tensors, which needs init='upcycle'"):
        run([*words("llama3", other), *given, "--dump_folder", "other"], tmp_path, fill=False)
