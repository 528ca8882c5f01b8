"""The one attention function that transformers calls for every rival."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from iha.hf.attention import autocast, decoded, iha_mask
from iha_lab.baselines.rival import Rival

NAME = "iha-rival"

# What a model may pass that changes the function and that no rival has.
_FOREIGN = {
    "softcap": "a soft cap of the logits",
    "s_aux": "attention sinks",
    "position_bias": "an additive position bias",
    "cache": "transformers' continuous batching cache",
}


def rival_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer: its rival's where it has one, its own elsewhere."""
    for name, what in _FOREIGN.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name} ({what}), which the rivals do not have;"
                " take another model."
            )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    visible, offset = decoded(attention_mask)
    rival = getattr(module, "rival", None)
    if rival is None:
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, visible, **options)
    if dropout:
        raise ValueError(
            f"the model drops attention weights (p = {dropout}), which the rivals' papers do not"
            " define; set attention_dropout (or attention_probs_dropout_prob) to 0 in its config."
        )
    assert isinstance(rival, Rival)
    if attention_mask is None and is_causal and query.shape[2] > 1:
        offset = 0  # transformers leaves the mask out only where the cache was empty before
    query, key, value = autocast(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = rival(query, key, value, visible=visible, causal=is_causal, scale=scale, offset=offset)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, rival_attention)
# IHA's, which is transformers' own and says where the queries stand, as windows need to know.
AttentionMaskInterface.register(NAME, iha_mask)
