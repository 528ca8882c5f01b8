"""IHA for Hugging Face models. Importing it registers everything:

the attention function and the mask function "iha", with transformers' own interfaces, and one
hook: when a model has built itself from a config that an upcycled model saved, its mixing tensors
are attached, so that `from_pretrained` finds where to put the saved ones.
"""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.fusion_mapping import (
    _FUSION_REGISTRY,  # pyright: ignore[reportPrivateUsage]
    ModuleFusionSpec,
)
from transformers.integrations.moe import ExpertsInterface

from iha.hf import continuous_batching
from iha.hf import modeling_iha as modeling_iha  # save_pretrained looks for it in sys.modules
from iha.hf.attention import NAME, SAVED_NAME, iha_attention, unrestored_attention
from iha.hf.masks import iha_mask
from iha.hf.model_class import model_class, restore_whatever_is_built
from iha.hf.patterns import attention_patterns
from iha.hf.upcycling import drop_unread_queries, upcycle

__all__ = ["attention_patterns", "drop_unread_queries", "model_class", "upcycle"]

for _name, _attention in ((NAME, iha_attention), (SAVED_NAME, unrestored_attention)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, iha_mask)
_FUSION_REGISTRY[SAVED_NAME] = ModuleFusionSpec()  # a saved config names it, switched off
ExpertsInterface.register(SAVED_NAME, unrestored_attention)  # and so did those of early folders
restore_whatever_is_built()
continuous_batching.keep(NAME)
