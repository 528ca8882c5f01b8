"""IHA for Hugging Face models. Importing it registers everything:

the attention function and the mask function "iha", with transformers' own interfaces, and one
hook: when a model has built itself from a config that an upcycled model saved, its mixing tensors
are attached, so that `from_pretrained` finds where to put the saved ones.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from iha.hf import modeling_iha as modeling_iha  # save_pretrained looks for it in sys.modules
from iha.hf.attention import NAME, iha_attention, iha_mask
from iha.hf.model_class import model_class
from iha.hf.upcycling import mixing_parameters, restore, upcycle

__all__ = ["mixing_parameters", "model_class", "upcycle"]


def _register() -> None:
    AttentionInterface.register(NAME, iha_attention)
    AttentionMaskInterface.register(NAME, iha_mask)
    build = PreTrainedModel.post_init
    if getattr(build, "restores_iha", False):
        return

    @functools.wraps(build)
    def post_init(self: Any) -> None:
        build(self)
        restore(self)

    post_init.restores_iha = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init


_register()
