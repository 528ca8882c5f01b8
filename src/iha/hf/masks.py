"""Which tokens see which, in a Hugging Face model: masks, the cache, packed documents.

A mask is transformers' own, as SDPA gets it. What the attention function has to know besides is
where the queries stand among the keys, since with a preallocated or sliding cache they are not the
last. For a mask that transformers makes, the mask function writes it down on the tensor (`Made`);
for a mask that the user gives, and where there is none, the cache is asked (`cache_offset`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.masking_utils import sdpa_mask

from iha.call import Causality
from iha.hf.attention_modules import may_cross

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, Shaped

# Mask functions of transformers that show nobody a later token, by name: a graph being compiled
# lets nobody look inside one. Unions of masks are called "or_mask".
_CAUSAL = ("causal_mask_function", "and_mask")

_CONTINUED = (
    "past_key_values holds packed documents (position_ids that start again, or cu_seq_lens_q), and"
    " new tokens would see them all; give each document a row of its own, padded, to continue it."
)
_STATE = (
    "the model has layers that carry a state from token to token (a convolution, linear attention),"
    " which would mix packed documents (position_ids that start again, or cu_seq_lens_q); give each"
    " document a row of its own, padded."
)


@dataclasses.dataclass(frozen=True)
class Made:
    """What is known of a mask because transformers made it: `mask.iha`.

    Args:
        offset: the key that is the first query's own token.
        causal: whether it is certain that no token sees a later one.
        window: if certain, the number of tokens, its own included, beyond which none sees back.
    """

    offset: int | Tensor
    causal: bool
    window: int | None


def iha_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    **arguments: Any,
) -> Bool[Tensor, "B 1 N S"] | None:
    """transformers' own mask for SDPA; None where the causal flag says it all."""
    offset: Any = q_offset  # an int or a tensor, whatever its annotation there says
    mask = sdpa_mask(batch_size, q_length, kv_length, offset, kv_offset, **arguments)
    if mask is None:
        return None
    function = arguments.get("mask_function")
    causal = (
        not arguments.get("use_vmap", False)  # a function that the model adds
        and "allow_is_bidirectional_skip" not in arguments
        and (function is None or getattr(function, "__name__", "") in _CAUSAL)
    )
    first: int | Tensor = q_offset - kv_offset
    if q_length == 1 and not isinstance(first, Tensor):
        # Decoding steps differ in it: as a number it would have each compiled anew.
        first = torch.full((), first, device=mask.device)
    made = Made(first, causal, arguments.get("local_size") if causal else None)
    mask.iha = made  # type: ignore[attr-defined]
    return mask


def cache_offset(module: Any, cache: Cache, mask: Tensor | None) -> int | Tensor | None:
    """The key that will be the first query's own token, by the cache that a module is called with.

    None where a mask says it, or where the layer takes another one's keys (Gemma 3n, Gemma 4).
    """
    layer = getattr(module, "layer_idx", None)
    shared = getattr(module, "is_kv_shared_layer", False)
    if layer is None or hasattr(mask, "iha") or shared:
        return None
    _, first_key = cache.get_mask_sizes(1, layer)
    return cache.get_query_offset(layer) - first_key  # out of place: the cache will move on


def note_packed(
    module: Any, cache: Any, mask: Tensor | None, documents: Int[Tensor, "B N"]
) -> None:
    """Write on `cache` whether a layer keeps packed documents, so that a later token sees several.

    Where a mask hides all but the last one there is nothing to note: what positions take for
    documents is then left padding. In a graph the note is a tensor.
    """

    def several() -> Tensor:
        of_keys, seen = documents, True
        if mask is not None:
            made: Made | None = getattr(mask, "iha", None)
            of_keys = _of_keys(documents, 0 if made is None else made.offset, mask.shape[-1])
            seen = visible_tokens(mask, 1)[:, 0, -1]
        return (seen & (of_keys != documents[:, -1:])).any()

    note = several() if mask is None else _once(mask, "several documents", several)
    layer = getattr(module, "layer_idx", None)
    if layer is not None and (torch.compiler.is_compiling() or bool(note)):
        cache.iha_packed = {**getattr(cache, "iha_packed", {}), layer: note}


def check_continues(module: Any, cache: Any) -> None:
    """Raise ValueError (in a graph, RuntimeError) if tokens would continue packed documents."""
    notes: dict[int, Tensor] = getattr(cache, "iha_packed", {})
    layer = getattr(module, "layer_idx", None)
    if layer not in notes:
        return
    packed, length = notes[layer], cache.get_seq_length(layer)
    _refuse(packed & (length > 0), _CONTINUED)
    if not torch.compiler.is_compiling():  # it was reset, or holds no packed documents
        cache.iha_packed = {n: note for n, note in notes.items() if n != layer}


def refuse_packed(
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> None:
    """Raise ValueError (in a graph, RuntimeError) if a model is given packed documents."""
    if cu_seq_lens_q is not None and len(cu_seq_lens_q) > 2:
        raise ValueError(_STATE)
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] == 1:
        return
    if (found := _restarts(position_ids)) is None:
        return
    if attention_mask is not None and attention_mask.ndim == 2:
        # Padding has documents of its own; what counts is whether the others have one.
        hidden = attention_mask[:, -position_ids.shape[1] :] == 0
        first = torch.where(hidden, found.amax(), found).amin(1, keepdim=True)
        found = torch.where(hidden, first, found)
    _refuse((found != found[:, :1]).any(), _STATE)


def _refuse(wrong: Tensor, why: str) -> None:
    if torch.compiler.is_compiling():  # the value is not known when a graph is made
        torch._assert_async(~wrong, why)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    elif bool(wrong):
        raise ValueError(why)


def visibility(
    module: Any,
    mask: Tensor | None,
    tokens: int,
    keys: int,
    *,
    is_causal: bool | None,
    offset: int | Tensor | None,
    documents: Int[Tensor, "B N"] | None,
) -> dict[str, Any]:
    """What the operator is to be told of who sees whom, in a layer with N `tokens` and S `keys`.

    As with SDPA, a mask says everything, and the causal flag (`is_causal`, or else that of the
    module) counts only where there is none. What is added is the order of a token's own
    pseudo-heads, under flat causality, and the window that the layer was upcycled with.
    """
    made: Made | None = getattr(mask, "iha", None)
    if mask is not None and made is None and mask.shape[-1] != keys:
        raise ValueError(
            f"attention_mask has {mask.shape[-1]} columns, and {type(module).__name__} has {keys}"
            " keys (those of earlier tokens are gone where a window crops the cache); give each key"
            " its column, or leave attention_mask 2D, so that transformers makes the mask."
        )
    causal, window = _causality(module, mask, tokens, is_causal), None
    if causal is not None:
        bounds = (module.iha.window, None if made is None else made.window)
        bounds = [bound for bound in bounds if bound is not None]
        window = min(bounds) if bounds else None
    if mask is not None and causal == "token" and (made is None or not made.causal):
        causal = None
    if causal is None and window is None and documents is None:
        offset = None  # no rule relates positions
    elif made is not None:
        offset = made.offset
    elif mask is None and tokens > 1:
        offset = 0  # transformers leaves the mask out only where the cache was empty before
    elif offset is None:
        if mask is not None and keys > tokens:
            raise ValueError(
                f"it is not known which of the {keys} keys are the {tokens} queries' own:"
                f" {type(module).__name__} was called with a mask of the user's own and without a"
                " cache that says it; leave attention_mask 2D, so that transformers makes the mask."
            )
        offset = max(keys - tokens, 0)
    if mask is not None:
        unsure = causal == "flat" and tokens > 1 and (made is None or not made.causal)
        mask = visible_tokens(mask, tokens, offset if unsure else None)
    if documents is not None:
        assert offset is not None
        documents = _of_keys(documents, offset, keys)
    return {
        "attn_mask": mask,
        "causal": causal,
        "window": window,
        "query_offset": offset,
        "document_ids": documents,
    }


def _causality(
    module: Any, mask: Tensor | None, tokens: int, is_causal: bool | None
) -> Causality | None:
    """The layer's causality. What declares nothing (Mllama's cross-attention) is never flat."""
    declared: bool | None = getattr(module, "is_causal", None)
    if mask is None and tokens > 1:
        flag = is_causal if is_causal is not None else declared is None or declared
    else:
        flag = is_causal or declared  # some models pass what SDPA is to do, not what they are
    if not flag:
        return None
    return "token" if declared is None and is_causal is None else module.iha.causal


def visible_tokens(
    mask: Shaped[Tensor, "#B #H #N S"], tokens: int, offset: int | Tensor | None = None
) -> Bool[Tensor, "#B #H #N S"]:
    """`mask` as a boolean one, True = attend; refused if it is none, or holds a bias.

    With `offset`, it is also refused if one of `tokens` queries sees a key behind its own.
    """
    if mask.dtype == torch.bool and offset is None:
        return mask
    name: tuple[object, ...] = ("visible", tokens, offset is None)
    if torch.compiler.is_compiling():
        # Whether to refuse depends on values, which only an operator of its own sees in a graph.
        first = offset
        if first is not None and not isinstance(first, Tensor):
            first = torch.full((), first, device=mask.device)
        return _once(mask, name, lambda: _checked(mask, tokens, first))
    if offset is not None and getattr(mask, "iha_own", None) is None:
        name = (*name, int(offset))  # the mask may come again with another one, in another pass
    return _once(mask, name, lambda: _read(mask, tokens, offset))


def _read(mask: Tensor, tokens: int, offset: int | Tensor | None) -> Tensor:
    if mask.dtype == torch.bool:
        visible = mask
    elif mask.is_floating_point():
        visible = mask == 0
        hidden = mask <= torch.finfo(torch.float16).min
        if not bool((visible | hidden).all()):
            raise ValueError(
                "attention_mask holds an additive bias; IHA takes boolean masks, or float ones"
                " that are 0 where visible and -inf (or the dtype's minimum) elsewhere."
            )
    else:
        raise TypeError(
            f"attention_mask must be boolean (True = attend) or floating (0 = attend), got"
            f" {mask.dtype}; convert it with .bool()."
        )
    if offset is not None:
        queries = torch.arange(tokens, device=mask.device) + offset
        keys = torch.arange(mask.shape[-1], device=mask.device)
        if bool((visible & (keys > queries[:, None])).any()):
            raise ValueError(
                "the model lets some tokens see later ones (a bidirectional image or prefix"
                " block), which causal='flat' would cut; upcycle it with causal='token'."
            )
    return visible


@torch.library.custom_op("iha::visible_tokens", mutates_args=())
def _checked(mask: Tensor, tokens: int, offset: Tensor | None) -> Tensor:
    return _read(mask, tokens, offset).clone()  # an operator's output is no view of its input


@_checked.register_fake
def _(mask: Tensor, tokens: int, offset: Tensor | None) -> Tensor:
    return torch.empty_like(mask, dtype=torch.bool)


def documents(
    module: Any,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    position_ids: Int[Tensor, "#B N"] | None,
    cu_seq_lens: Int[Tensor, " D"] | None,
) -> Int[Tensor, "B N"] | None:
    """Which of the packed documents each query token belongs to; None where there is but one.

    `cu_seq_lens` are their bounds in the flattened batch, as FlashAttention has them. In
    `position_ids`, which are those of the queries and in self-attention of the keys, a document
    begins where positions do not go up. (A jump upwards is none: under context parallelism the
    tokens between are on another device.) A mask of the user's own says everything, documents too.
    """
    B, N = query.shape[0], query.shape[2]
    made = mask is None or hasattr(mask, "iha") or "switched_from_eager" in vars(module)
    if not made:
        return None
    causal: bool = getattr(module, "is_causal", True)
    if cu_seq_lens is not None:
        if not causal and key.shape[2] != N:
            raise ValueError(
                "cu_seq_lens_q packs documents, and in cross-attention it does not say which"
                " document a key belongs to; give a 4D attention mask instead."
            )
        tokens = torch.arange(B * N, device=query.device).view(B, N)
        bounds = cu_seq_lens.to(query.device, torch.long)
        return torch.searchsorted(bounds, tokens, right=True)
    if position_ids is None or tuple(position_ids.shape) not in ((1, N), (B, N)):
        return None
    if not causal and (key.shape[2] != N or may_cross(type(module))):
        return None
    found = None if N == 1 else _once(position_ids, "documents", lambda: _restarts(position_ids))
    return None if found is None else found.expand(B, -1)


def within_documents(
    mask: Bool[Tensor, "B 1 N S"] | None, documents: Int[Tensor, "B N"], keys: int
) -> Bool[Tensor, "B 1 N S"]:
    """`mask`, made by transformers, and None else than within each document."""
    made: Made | None = getattr(mask, "iha", None)
    of_keys = _of_keys(documents, 0 if made is None else made.offset, keys)
    same = (documents[:, :, None] == of_keys[:, None])[:, None]
    return same if mask is None else mask & same


def _restarts(position_ids: Tensor) -> Tensor | None:
    # By index: a graph of any length asks of what has one token less how long it is.
    tokens = torch.arange(position_ids.shape[1], device=position_ids.device)
    starts = (position_ids <= position_ids[:, (tokens - 1).clamp(min=0)]) & (tokens > 0)
    if not torch.compiler.is_compiling() and not bool(starts.any()):
        return None
    return starts.cumsum(-1)


def _of_keys(documents: Int[Tensor, "B N"], offset: int | Tensor, keys: int) -> Int[Tensor, "B S"]:
    """The document of each key; what the cache held before belongs to the first."""
    tokens = documents.shape[1]
    if tokens == keys:
        return documents
    places = torch.arange(tokens, device=documents.device) + offset
    return documents[:, :1].repeat(1, keys).index_copy(1, places, documents)


def own(tensor: Any) -> Any:
    """`tensor` for this pass of the model alone, so that all layers share what `_once` computes."""
    if isinstance(tensor, dict):
        return {name: own(one) for name, one in tensor.items()}  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(tensor, Tensor):
        return tensor
    view: Any = tensor.view_as(tensor)
    view.iha_own = {}
    if hasattr(tensor, "iha"):
        view.iha = tensor.iha  # type: ignore[attr-defined]
    return view


def _once(tensor: Any, name: Hashable, compute: Callable[[], Any]) -> Any:
    """`compute()`, kept on `tensor` for the other layers until somebody writes to it."""
    kept: Any = getattr(tensor, "iha_own", None)
    if kept is not None:
        pass
    elif torch.compiler.is_compiling() or tensor.is_inference():  # which does not count writes
        return compute()
    else:
        version, kept = getattr(tensor, "iha_kept", (None, {}))
        if version != tensor._version:
            kept = {}
            tensor.iha_kept = tensor._version, kept
    if name not in kept:
        kept[name] = compute()
    return kept[name]
