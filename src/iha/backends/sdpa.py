"""Mix, interleave, one `scaled_dot_product_attention` over N·P virtual tokens, collapse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from iha.backends import merged
from iha.call import Call, Refusal
from iha.checks import known
from iha.mixing import interleaved_inputs, interleaved_output, paired
from iha.visibility import virtual_mask

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

NAME = "sdpa"

LONG = 512  # query tokens from which on parts cost less than one product with a mask


def refusal(call: Call) -> Refusal | None:
    if call.softcap is not None:
        return lambda: "scaled_dot_product_attention has no soft-cap; 'chunked' has"
    return None


def needs_dense_mask(call: Call) -> bool:
    """Whether `run` would write a mask of all N·P x S·P pairs."""
    return not one_product(call) and not _mergeable(call)


def one_product(call: Call) -> bool:
    """Whether one SDPA without a mask says all that there is to say."""
    limits = (call.causal, call.window, call.attn_mask, call.document_ids)
    return all(limit is None for limit in limits) or _builtin_causality(call)


def run(call: Call) -> Tensor:
    is_causal = False
    if _builtin_causality(call):
        is_causal = True  # a plain bool: in a dynamic graph the comparison itself is none
        # Keys behind the last query (an unfilled static cache) are invisible to all: left out.
        N = call.query.shape[2]
        call = call.replace(key=call.key[:, :, :N], value=call.value[:, :, :N])
    elif _mergeable(call):
        return merged.run(paired(call), merged.on_cpu(call.scale))
    mask = None if is_causal else virtual_mask(call)
    if mask is not None:
        mask = mask.flatten(4, 5).flatten(2, 3)
    virtual = attend(call, *interleaved_inputs(paired(call)), mask, is_causal=is_causal)
    return interleaved_output(call, virtual)


def attend(
    call: Call,
    query: Float[Tensor, "B h L d"],
    key: Float[Tensor, "B g M d"],
    value: Float[Tensor, "B g M d"],
    mask: Bool[Tensor, "#B #h L M"] | None,
    *,
    is_causal: bool = False,
) -> Float[Tensor, "B h L d"]:
    """SDPA as `call` wants it, on sequences that are mixed already; all-masked rows give zeros."""
    scale = call.scale
    if scale <= 0:
        # The kernels hide a score before they scale it, or take the largest before.
        query, scale = query * (-1 if scale < 0 else 0), -scale or 1.0
    # By keyword or not at all: in a dynamic graph the comparison itself is no bool.
    grouped = {"enable_gqa": True} if call.heads_per_kv > 1 else {}
    # Looked up at each call: context parallelism puts another function there.
    output = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=call.dropout_p,
        is_causal=is_causal,
        scale=scale,
        **grouped,
    )
    if mask is None or (call.attn_mask is None and call.document_ids is None):
        return output  # by position alone a query always sees itself
    # Not every kernel behind SDPA gives zeros for a row that sees nothing.
    return output.where(mask.any(-1, keepdim=True), 0.0)


def _builtin_causality(call: Call) -> bool:
    """Whether the kernel's own upper-left causal flag says all that there is to say."""
    flat = call.causal == "flat" or (call.causal == "token" and call.pseudo_heads == 1)
    whole = call.pseudo_queries == call.pseudo_heads
    return flat and whole and _causality_alone(call) and bool(call.query_offset == 0)


def _causality_alone(call: Call) -> bool:
    """Whether nothing but causality at a known offset limits what is seen."""
    others = (call.window, call.attn_mask, call.document_ids)
    fixed = isinstance(call.query_offset, int)
    return call.causal is not None and fixed and all(limit is None for limit in others)


def _mergeable(call: Call) -> bool:
    """Whether `merged` does it without a mask."""
    plain = call.softcap is None and call.dropout_p == 0 and call.scale > 0
    here = call.query.device.type == "cpu" and known(call.query.shape[2] >= LONG)
    return here and plain and _causality_alone(call)
