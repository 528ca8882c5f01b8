"""Tensor parallelism by transformers' own plans: heads are gathered before the mixing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import iha.hf  # also registers IHA in each process
from tests.hf.families import inputs, moved, tiny
from tests.stacks.processes import run

# Settings of the upcycling. Qwen 3 and Gemma 3 norm heads, Phi 3 has one projection for all three,
# Mixtral has experts; of Mistral and Llama some layers stay plain.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"pseudo_heads": {0: 3, 2: 2}, "rope": "fractional"},
    "mistral": {"pseudo_heads": 2, "layers": [1]},
    "qwen3": {"pseudo_heads": 2, "pseudo_queries": 1},
    "gemma2": {"pseudo_heads": 2},
    "gemma3": {"pseudo_heads": 2},
    "phi3": {"pseudo_heads": 2},
    "mixtral": {"pseudo_heads": 2},
}
GRID = ("llama", "qwen3")
IDS = torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(3))
SAME: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}


def loss_and_gradients(model: Any, family: str) -> tuple[Tensor, dict[str, Tensor]]:
    given = inputs(family)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    loss = model(**given, labels=labels).loss
    loss.backward()
    found = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def on_two_ranks(folder: str) -> dict[str, tuple[Tensor, dict[str, Tensor], bool]]:
    found: dict[str, tuple[Tensor, dict[str, Tensor], bool]] = {}
    for family in FAMILIES:
        path = Path(folder, family)
        split = DistributedConfig(tp_size=2)
        model = AutoModelForCausalLM.from_pretrained(path, distributed_config=split).eval()
        shards = [p for n, p in model.named_parameters() if "self_attn.o_proj" in n]
        sharded = all(hasattr(p, "placements") for p in shards)
        found[family] = (*loss_and_gradients(model, family), sharded)
        model.save_pretrained(Path(folder, f"{family}-{distributed.get_rank()}"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family, settings in FAMILIES.items():
        model = moved(iha.upcycle(tiny(family, vocab_size=100), **settings))
        model.save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run(on_two_ranks, str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_the_unsharded_ones(
    family: str, folder: Path, ranks: list[dict[str, Any]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / family).eval()
    expected, gradients = loss_and_gradients(model, family)
    for rank in ranks:
        loss, found, sharded = rank[family]
        assert sharded
        torch.testing.assert_close(loss, expected, **SAME)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                found[name], gradient, **SAME, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_whole(family: str, folder: Path, ranks: list[dict[str, Any]]) -> None:
    assert ranks
    before = load_file(folder / family / "model.safetensors")
    after = load_file(folder / f"{family}-0" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def on_a_grid(folder: str) -> dict[str, tuple[Tensor, dict[str, Tensor], int]]:
    """Two by two processes: heads over two, and weights and sequences over two."""
    found: dict[str, tuple[Tensor, dict[str, Tensor], int]] = {}
    for family in GRID:
        split = DistributedConfig(tp_size=2, fsdp_size=2)
        model = AutoModelForCausalLM.from_pretrained(Path(folder, family), distributed_config=split)
        mine = IDS.chunk(2)[distributed.get_rank() // 2]  # neighbours share heads
        loss = model.eval()(input_ids=mine, labels=mine).loss
        loss.backward()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        layer = model.model.layers[0].self_attn.o_proj.weight
        found[family] = (mean / 4, gradients, len(layer.placements))
    return found


@pytest.mark.slow
def test_heads_and_weights_over_a_grid_of_processes(folder: Path) -> None:
    ranks = run(on_a_grid, str(folder), world=4)
    for family in GRID:
        model = AutoModelForCausalLM.from_pretrained(folder / family).eval()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for rank in ranks:
            found, gradients, axes = rank[family]
            assert axes == 2
            torch.testing.assert_close(found, loss.detach(), **SAME)
            torch.testing.assert_close(gradients, expected, **SAME)
