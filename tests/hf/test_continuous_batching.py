"""transformers' own server loop gives what generating each prompt alone gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import iha
from tests.hf.families import tiny

PAGE_SIZE = "page_size"
if not hasattr(ContinuousBatchingConfig, PAGE_SIZE):
    PAGE_SIZE = "block_size"  # before transformers 5.19

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"pseudo_heads": 3}),
    "some layers, positions": ("llama", {"pseudo_heads": {0: 2, 2: 3}, "rope": "fractional"}),
    "windows": ("llama", {"pseudo_heads": 2, "window": 4}),
    "token causality": ("qwen3", {"pseudo_heads": 2, "causal": "token", "window": 4}),
    "the model's own window": ("mistral", {"pseudo_heads": 2, "layers": [0, 1]}),
    "one fused projection": ("gpt_neox", {"pseudo_heads": 2}),
    "soft-cap": ("gemma2", {"pseudo_heads": 2, "layers": [0, 1]}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_prompt_gets_what_it_gets_alone(case: str) -> None:
    family, arguments = CASES[case]
    model = iha.upcycle(tiny(family), **arguments)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in iha.mixing_parameters(model):
            parameter += 0.3 * torch.randn_like(parameter)
    prompts = [torch.randint(3, 99, (n,)).tolist() for n in (1, 5, 14, 9)]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    expected = [
        model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    found = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(**options),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=64, max_batch_tokens=16, **{PAGE_SIZE: 8}
        ),
        progress_bar=False,
    )
    assert [output.generated_tokens for output in found.values()] == expected
    assert model.config._attn_implementation == "iha"
