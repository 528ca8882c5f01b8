"""NeMo AutoModel builds the model of a recipe by examples/nemo, and saves it.

Needs NeMo AutoModel, in an environment of its own: `make test-stacks`. It wants a GPU: its three
questions for one are answered here, so that the rest of it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import distributed

import iha.hf
from tests.hf.families import moved, tiny, trained

pytest.importorskip("nemo_automodel")
pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[3] / "examples" / "nemo" / "iha_nemo.py"
IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_ENABLE_USER_MODULES", "1")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(transformers.PreTrainedModel, "to", lambda self, *_, **__: self)


def built(folder: Path, **settings: Any) -> Any:
    """The model as the fine-tuning recipe builds it from its config."""
    from nemo_automodel.components.config import loader
    from nemo_automodel.recipes.llm.train_ft import build_model

    loader.set_enable_user_modules(True)
    config = {
        "_target_": f"{EXAMPLE}:from_pretrained",
        "pretrained_model_name_or_path": str(folder),
        "torch_dtype": "float32",
        **settings,
    }
    return build_model(loader.ConfigNode(config), None, seed=0)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_a_plain_model_is_upcycled(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    model = built(tmp_path, pseudo_heads=3)
    assert {p.shape[-1] for p in iha.mixing_parameters(model)} == {3}
    torch.testing.assert_close(logits(model), logits(tiny("llama")), atol=1e-5, rtol=0)


def test_a_saved_iha_model_keeps_its_mixing(tmp_path: Path) -> None:
    trained("llama").save_pretrained(tmp_path)
    torch.testing.assert_close(logits(built(tmp_path)), logits(trained("llama")))


def test_its_checkpoint_is_an_iha_folder(tmp_path: Path) -> None:
    from nemo_automodel.components.checkpoint.checkpointing import Checkpointer, CheckpointingConfig

    tiny("llama").save_pretrained(tmp_path / "base")
    model = moved(built(tmp_path / "base"))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        config = CheckpointingConfig(
            checkpoint_dir=tmp_path, model_repo_id=str(tmp_path / "base"), save_consolidated="every"
        )
        Checkpointer(config, 0, 0, 0).save_model(model, str(tmp_path / "saved"))
    finally:
        distributed.destroy_process_group()
    folder = tmp_path / "saved" / "model" / "consolidated"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded), logits(model))
