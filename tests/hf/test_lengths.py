"""A model with windows, or a soft-cap, exports once for every length, as a plain one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.hf.families import trained


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {}),
        ("gemma2", {}),
        ("gemma2", {"causal": "token", "rope": "fractional", "pseudo_queries": 1}),
    ],
)
def test_a_model_exports_at_any_length(family: str, settings: dict[str, Any]) -> None:
    model = trained(family, **settings)
    assert model.config.sliding_window == 5
    model.config.use_cache = False
    length = torch.export.Dim("length", min=2, max=500)
    ids = torch.randint(3, 99, (2, 63), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exported = torch.export.export(
            model,
            (),
            {"input_ids": ids[:, :11].contiguous()},
            dynamic_shapes={"input_ids": {1: length}},
            strict=False,
        ).module()
        for N in (2, 4, 5, 6, 33, 63):
            output = exported(input_ids=ids[:, :N]).logits
            torch.testing.assert_close(output, model(ids[:, :N]).logits, atol=1e-4, rtol=1e-4)
