"""torch.export of a trained model, with a length that the program takes as it comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.hf.families import trained


class Logits(nn.Module):
    """A model as a function of token ids alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("causal", ["flat", "token"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2"])
def test_one_program_serves_every_length(family: str, causal: str) -> None:
    model = Logits(trained(family, causal=causal))
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    length: Any = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, (ids,), dynamic_shapes={"input_ids": {1: length}})
    for tokens in (2, 7, 40):
        given = ids.repeat(1, 4)[:, :tokens]
        torch.testing.assert_close(program.module()(given), model(given), atol=1e-4, rtol=1e-4)
