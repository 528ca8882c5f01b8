"""The attention function and the mask function that transformers calls: all of IHA's forward pass.

transformers hands over query, key and value after RoPE and after the cache: the base tensors of
the definition. The mask function adds the one thing that the attention function cannot know, which
key is a query's own token, since with a preallocated or sliding cache it is not the last.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "iha"
# Those of engines that call IHA by themselves (iha.integrations), and may stay.
ENGINES = ("vllm",)
# In config.json: a program that does not know it quotes it in its error, "… is not supported".
SAVED_NAME = "iha, which needs `import iha.hf` or trust_remote_code=True"
VISIBLE, OWN = 1, 2  # bits of the encoded mask

# What a model may pass that changes the function and that the operator does not have.
_FOREIGN = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "an additive position bias",
    "cache": "transformers' continuous batching cache",
}


def iha_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    **arguments: Any,
) -> Tensor | None:
    """transformers' own boolean mask with a second bit, OWN, where the key is the query's token.

    (batch, 1, queries, keys) in uint8, or None where SDPA's causal flag says it all.
    """
    offset: Any = q_offset  # an int or a tensor, whatever its annotation there says
    mask = sdpa_mask(batch_size, q_length, kv_length, offset, kv_offset, **arguments)
    if mask is None:
        return None
    queries = torch.arange(q_length, device=mask.device)[:, None] + q_offset
    keys = torch.arange(kv_length, device=mask.device) + kv_offset
    encoded = mask.to(torch.uint8) * VISIBLE | (keys == queries).to(torch.uint8) * OWN
    if q_length > 1 and not torch.compiler.is_compiling():
        # Found once for all layers; lost on the way only where a graph is compiled.
        encoded.sees_later = bool((mask & (keys > queries)).any())  # type: ignore[attr-defined]
    return encoded


def iha_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer: IHA where the module carries a mixing, its own elsewhere."""
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    visible, own = decoded(attention_mask)
    # A `HeadMixing`, or what wraps one (PEFT does); how to call it stands in `module.iha`.
    mixing: Any = getattr(module, "head_mixing", None)
    if mixing is None:
        options = {
            "dropout": dropout,
            "scaling": scaling,
            "is_causal": is_causal,
            "sliding_window": sliding_window,
            "softcap": softcap,
        }
        return _plain(module, query, key, value, visible, options | kwargs)
    settings: Any = module.iha
    for name, what in _FOREIGN.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name} ({what}), which IHA does not have."
            )
    if kwargs.get("output_attentions"):
        warnings.warn(
            "IHA returns no attention weights: a layer has up to P² patterns a head; the"
            " output has None in their place.",
            stacklevel=2,
        )
    causal, windows = None, []
    if is_causal:
        causal, windows = settings.causal, [settings.window, sliding_window]
    if is_causal and _sees_later(attention_mask, visible):
        if settings.causal == "flat":
            raise ValueError(
                "the model lets some tokens see later ones (a bidirectional image or prefix"
                " block), which causal='flat' would cut; upcycle it with causal='token'."
            )
        causal, windows = None, [settings.window]  # the mask says the rest, the model's window too
    query, key, value = autocast(query, key, value)
    phase = settings.phase(query.device)
    if phase is not None and settings.rotary_start:
        # The operator turns the first dimensions; scores do not depend on their order.
        query, key = (tensor.roll(-settings.rotary_start, -1) for tensor in (query, key))
    N, S = query.shape[2], key.shape[2]
    if own is None and attention_mask is None and is_causal and N > 1:
        own = 0  # transformers leaves the mask out only where the cache was empty before
    windows = [window for window in windows if window is not None]
    output = mixing(
        query,
        key,
        value,
        attn_mask=visible,
        causal=causal,
        window=min(windows, default=None),
        query_offset=own if S >= N else None,
        phase=phase,
        rotary=settings.rotary,
        dropout_p=dropout,
        scale=scaling,
        softcap=softcap,
        backend=settings.backend,
    )
    return output.transpose(1, 2).contiguous(), None


def unrestored_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Registered under `SAVED_NAME`, which no model has any more once its mixing is attached."""
    raise ValueError(
        f"the config of {type(module).__name__} asks for IHA and has no entry 'iha', which says"
        " what its mixing tensors are; restore config.json from where the model was saved."
    )


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's dtype, as SDPA takes them: RoPE in float32 has left value alone in half."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def decoded(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(which tokens are visible, the position of the first query's own token), if known."""
    if mask is None:
        return None, None
    if mask.dtype == torch.uint8:
        return (mask & VISIBLE).bool(), (mask[0, 0, 0] & OWN).argmax()
    if mask.dtype == torch.bool:
        return mask, None
    # A 4D mask of the user's own: 0 where visible, a huge negative number elsewhere.
    visible = mask >= 0
    if not torch.compiler.is_compiling():
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not bool((hidden | (mask == 0)).all()):
            raise ValueError(
                "attention_mask holds an additive bias; IHA takes boolean masks, or float ones"
                " that are 0 where visible and -inf (or the dtype's minimum) elsewhere."
            )
    return visible, None


def _sees_later(mask: Tensor | None, visible: Tensor | None) -> bool:
    """Whether some token sees one behind it, as in a bidirectional block of an image."""
    if visible is None or torch.compiler.is_compiling():
        return False
    known = getattr(mask, "sees_later", None)
    if known is None:  # a 4D mask of the user's own
        known = bool(visible.triu(visible.shape[3] - visible.shape[2] + 1).any())
    return known


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The layer's own attention: SDPA, or the model's eager function for what SDPA cannot do."""
    if options["softcap"] is None and options.get("s_aux") is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, visible, **options)
    if visible is None and options["is_causal"] and query.shape[2] > 1:
        visible = torch.ones(
            query.shape[2], key.shape[2], dtype=torch.bool, device=query.device
        ).tril()[None, None]
    mask = None
    if visible is not None:
        mask = query.new_zeros(visible.shape).masked_fill(~visible, torch.finfo(query.dtype).min)
    eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    return eager(module, query, key, value, mask, **options)
