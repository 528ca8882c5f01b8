"""Axolotl 0.19: IHA as a plugin, which upcycles the model before LoRA is put on it.

The config beside this file has the settings. `axolotl` finds the plugin on PYTHONPATH.
"""

import torch
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

import iha.hf


class IhaArguments(BaseModel):
    iha_pseudo_heads: int = 2
    iha_learning_rate: float | None = None  # of the mixing; default: learning_rate


class IhaPlugin(BasePlugin):
    def get_input_args(self):
        return f"{__name__}.IhaArguments"

    def post_model_build(self, cfg, model):
        if cfg.attn_implementation != "sdpa":
            raise ValueError(f"attn_implementation must be sdpa, got {cfg.attn_implementation}.")
        if not hasattr(model.config, "iha"):  # a saved IHA model has its mixing already
            iha.upcycle(model, cfg.iha_pseudo_heads)

    def create_optimizer(self, cfg, trainer):
        rates = {"lr": cfg.learning_rate, "mixing_lr": cfg.iha_learning_rate}
        decay = cfg.weight_decay or 0.0
        return torch.optim.AdamW(iha.parameter_groups(trainer.model, **rates, weight_decay=decay))
