"""Quantised projections with trained mixing: upcycled after, or loaded with a quantisation.

Needs torchao and optimum-quanto: `make test-stacks`. bitsandbytes does not run on CPUs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import iha
from tests.hf.families import inputs, moved, tiny, trained

pytestmark = pytest.mark.slow
FAMILIES = ("llama", "mistral", "qwen3")


def settings(package: str) -> Any:
    if package == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("optimum.quanto")
    return transformers.QuantoConfig(weights="int8")


def by_reference(model: Any) -> Any:
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.iha = dataclasses.replace(attention.iha, backend="reference")
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("package", ["torchao", "quanto"])
def test_only_the_mixing_is_new_in_a_quantised_model(
    package: str, family: str, tmp_path: Path
) -> None:
    given = inputs(family)
    real = given["attention_mask"].bool()

    def load(folder: str) -> Any:
        quantization = settings(package)
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, quantization_config=quantization
        ).eval()

    def logits(model: Any) -> torch.Tensor:
        return model(**given).logits[real]

    tiny(family).save_pretrained(tmp_path / "plain")
    trained(family).save_pretrained(tmp_path / "iha")
    model = load("plain")
    plain = logits(model)
    assert (plain - logits(tiny(family))).abs().max() > 1e-3  # it is quantised
    iha.upcycle(model, 2)
    torch.testing.assert_close(logits(model), plain, atol=2e-5, rtol=0)

    expected = logits(moved(model))
    assert (expected - plain).abs().max() > 0.1
    loaded = load("iha")
    assert all(p.dtype == torch.float32 for p in iha.mixing_parameters(loaded))
    torch.testing.assert_close(logits(loaded), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(by_reference(loaded)), expected, atol=2e-5, rtol=0)
