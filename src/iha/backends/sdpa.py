"""Mix, interleave, one `scaled_dot_product_attention` over N·P virtual tokens, collapse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from iha.call import Call, virtual_mask
from iha.mixing import interleaved_inputs, interleaved_output

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

NAME = "sdpa"


def refusal(call: Call) -> str | None:
    if call.softcap is not None:
        return "scaled_dot_product_attention has no soft-cap; 'reference' has"
    return None


def run(call: Call) -> Tensor:
    call, is_causal = _with_builtin_causality(call)
    mask = None if is_causal else virtual_mask(call)
    if mask is not None:
        mask = mask.flatten(4, 5).flatten(2, 3)
    virtual = attend(call, *interleaved_inputs(call), mask, is_causal=is_causal)
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
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=call.dropout_p,
        is_causal=is_causal,
        scale=call.scale,
        enable_gqa=call.groups > 1,
    )
    # Not every kernel behind SDPA gives zeros for a row that sees nothing.
    return output if mask is None else output.where(mask.any(-1, keepdim=True), 0.0)


def _with_builtin_causality(call: Call) -> tuple[Call, bool]:
    """The call and True where the kernel's own upper-left causal flag says all that there is to say."""
    flat = call.causal == "flat" or (call.causal == "token" and call.pseudo_heads == 1)
    if not flat or call.window is not None or call.attn_mask is not None:
        return call, False
    if call.document_ids is not None or not isinstance(call.query_offset, int):
        return call, False
    if call.query_offset != 0:
        return call, False
    # Keys behind the last query (an unfilled static cache) are invisible to all: leave them out.
    tokens = call.query.shape[2]
    return call.replace(key=call.key[:, :, :tokens], value=call.value[:, :, :tokens]), True
