"""The attention function that transformers calls: all of IHA's forward pass.

transformers hands over query, key and value after RoPE and after the cache: the base tensors of
the definition. Who sees whom it says as for SDPA; `iha.hf.masks` reads that.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import (
    _active_collector,  # pyright: ignore[reportPrivateUsage]
)

from iha.call import Call, autocasts
from iha.hf import continuous_batching, masks
from iha.hf.attention_modules import replaced_forward
from iha.patterns import snapshot, token_weights

NAME = "iha"
# Those of engines that call IHA by themselves (iha.integrations), and may stay.
ENGINES = ("vllm",)
# In config.json: a program that does not know it quotes it in its error, "… is not supported".
SAVED_NAME = "iha, which needs `import iha.hf` or trust_remote_code=True"

# What a model may pass that changes the function and that the operator does not have.
_FOREIGN = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "an additive position bias",
}


def iha_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    positions_of_model: Tensor | None = None,
    kept_in: Cache | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer: IHA where the module carries a mixing, its own elsewhere.

    `positions_of_model` and `kept_in` are what `hand_down_positions` and `prepare` add.
    """
    vars(module).pop("awaits_attention", None)
    position_ids = positions_of_model if position_ids is None else position_ids
    if isinstance(attention_mask, BlockMask):
        raise TypeError(
            "attention_mask is a BlockMask, which is FlexAttention's; give IHA a boolean mask"
            " instead: torch.nn.attention.flex_attention.create_mask of the same mask_mod."
        )
    if (pages := options.pop("cache", None)) is not None:
        options |= {"cu_seq_lens_q": cu_seq_lens_q}
        return continuous_batching.attention(module, query, key, value, pages, _plain, options)
    documents = masks.documents(module, query, key, attention_mask, position_ids, cu_seq_lens_q)
    if documents is not None and kept_in is not None:
        masks.note_packed(module, kept_in, attention_mask, documents)
    attend = _plain if getattr(module, "head_mixing", None) is None else _interleaved
    return attend(module, query, key, value, attention_mask, documents, **options)


def _interleaved(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    query_offset: int | Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if vars(module).pop("switched_from_eager", False):
        module.config._attn_implementation_internal = "eager"
    _check(module, query, key, kwargs)
    visibility = masks.visibility(
        module,
        mask,
        query.shape[2],
        key.shape[2],
        is_causal=is_causal,
        offset=query_offset,
        documents=documents,
    )
    query, key, value = autocast(query, key, value)
    query, key = module.iha.aligned(query, key)
    # A `HeadMixing`, or what wraps one (PEFT does); how to call it stands in `module.iha`.
    seen, asked, shown = vars(module).get("attention_seen"), _asks_for_weights(kwargs), []

    def record(call: Call) -> None:  # while the mixing tensors are there: they may be offloaded
        if seen is not None:
            seen.append(snapshot(call))
        if asked:
            shown.append(token_weights(call, range(call.query.shape[1])).to(call.query.dtype))

    output = module.head_mixing(
        query,
        key,
        value,
        record=record if asked or seen is not None else None,
        **visibility,
        phase=module.iha.phase(query.device),
        rotary=module.iha.rotary,
        dropout_p=dropout,
        scale=scaling,
        softcap=softcap,
        backend=module.iha.backend,
    )
    return output.transpose(1, 2).contiguous(), shown[0] if shown else None


def _asks_for_weights(options: dict[str, Any]) -> bool:
    """Whether `output_attentions` is set. Not all models hand it down (GPT-2 does not)."""
    if options.get("output_attentions") or torch.compiler.is_compiling():
        return bool(options.get("output_attentions"))
    return any("attentions" in kind for kind in _active_collector.get() or ())


def _check(module: Any, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    """Refuse what would change the function and what IHA does not have."""
    for name, what in _FOREIGN.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name} ({what}), which IHA does not have."
            )
    heads, kv_heads = module.iha.num_heads, module.iha.num_kv_heads
    if (query.shape[1], key.shape[1]) != (heads, kv_heads) or hasattr(query, "placements"):
        raise ValueError(
            f"{type(module).__name__} has {heads} query and {kv_heads} key/value heads, and this"
            f" process holds {query.shape[1]} and {key.shape[1]} of them (tensor parallelism); IHA"
            " mixes all heads of a layer, so leave q_proj, k_proj, v_proj and o_proj of its layers"
            " out of the tensor-parallel plan, or shard with FSDP."
        )


def unrestored_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Registered under `SAVED_NAME`, which no model has any more once its mixing is attached."""
    raise ValueError(
        f"the config of {type(module).__name__} asks for IHA and has no entry 'iha', which says"
        " what its mixing tensors are; restore config.json from where the model was saved."
    )


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's dtype, as SDPA takes them: RoPE in float32 has left value alone in half."""
    device = tensors[0].device
    if not autocasts(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device.type)) for tensor in tensors)


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The layer's own attention: SDPA, or the model's eager function for what SDPA cannot do."""
    N, S = query.shape[2], key.shape[2]
    seen = vars(module).get("attention_seen")
    dense = any(options.get(name) is not None for name in ("softcap", "s_aux", "sinks"))
    dense |= seen is not None or _asks_for_weights(options)
    if mask is None and (dense or documents is not None):
        flag = options.get("is_causal")
        causal = flag if flag is not None else getattr(module, "is_causal", True)
        if causal and N > 1:
            mask = torch.ones(N, S, dtype=torch.bool, device=query.device).tril()[None, None]
    if documents is not None:
        mask = masks.within_documents(mask, documents, S)
    if not dense:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)
    if mask is not None and mask.dtype == torch.bool:
        mask = query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(
            f"{type(module).__name__} has no eager_attention_forward in its file, which attention"
            " weights and a soft-cap need; call it without them."
        )
    output, weights = eager(module, query, key, value, mask, **options)
    if seen is not None:
        seen.append(weights)
    return output, weights


def prepare(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of an attention module: IHA is what it calls, if it carries a mixing."""
    chosen, mixes = module.config._attn_implementation, hasattr(module, "head_mixing")
    if mixes and chosen == "eager":
        # transformers switches to it for all when it needs weights of some (Whisper's timestamps).
        module.config._attn_implementation_internal = NAME
        module.switched_from_eager = True
    elif mixes and chosen not in (NAME, *ENGINES):
        raise ValueError(
            f"the model's attention was set to {chosen!r}, which would leave its mixing tensors"
            f" out; call model.set_attn_implementation({NAME!r})."
        )
    if mixes and chosen not in ENGINES:
        module.awaits_attention = True
    cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
    if cache is None or not (mixes or chosen == NAME):
        return args, kwargs
    masks.check_continues(module, cache)
    kwargs = {**kwargs, "kept_in": cache}
    offset = masks.cache_offset(module, cache, kwargs.get("attention_mask")) if mixes else None
    return args, kwargs if offset is None else {**kwargs, "query_offset": offset}


def check_called(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a module with a mixing: its forward called the attention function."""
    if vars(module).pop("awaits_attention", False):
        raise ValueError(replaced_forward(module))


def hand_down_positions(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a model: its position_ids for the attention function.

    Not all models hand them down so far (Llama 4, Persimmon), and they say where packed documents
    begin. Positions and masks become this pass's own, so that they are read once for all layers.
    """
    given = {**dict(zip(model.iha_arguments, args, strict=False)), **kwargs}
    if not model.iha_packs:
        masks.refuse_packed(**given)
    given |= {n: masks.own(given[n]) for n in ("position_ids", "attention_mask") if n in given}
    return (), {**given, "positions_of_model": given.get("position_ids")}
