"""The P² attention patterns that one head of an IHA layer has on a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iha.checks import checked_call
from iha.mixing import mix, rotate_by_phase
from iha.modules import HeadMixing
from iha.visibility import virtual_mask

if TYPE_CHECKING:
    from jaxtyping import Float


def mixing_layers(model: Any) -> dict[str, HeadMixing]:
    """Map the name of each upcycled attention module to its mixing."""
    return {
        name.removesuffix(".head_mixing"): module
        for name, module in model.named_modules()
        if isinstance(module, HeadMixing)
    }


@torch.no_grad()
def attention_patterns(
    model: Any, inputs: dict[str, Tensor], layer: str, head: int
) -> Float[Tensor, "P P N S"]:
    """Return the softmax weights A[p, q, n, s] of pseudo-query (n, p) on pseudo-key (s, q).

    For each (n, p) they sum to one over all (s, q): P² maps that share one softmax
    (arXiv 2602.21371, section 3). Looks at the first sequence of the batch. Written from the
    definition, since no fast attention gives its weights.
    """
    mixing = mixing_layers(model)[layer]
    seen: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
    hook = mixing.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        hook.remove()
    (base, arguments), *_ = seen
    arguments = {name: value for name, value in arguments.items() if name != "backend"}
    tensors = (mixing.alpha_q, mixing.alpha_k, mixing.alpha_v, mixing.collapse)
    call = checked_call(*(t[:1].float() for t in base), *(t.float() for t in tensors), **arguments)
    query = rotate_by_phase(mix(call.query, call.alpha_q), call.phase, call.rotary)[0, head]
    key = rotate_by_phase(mix(call.key, call.alpha_k), call.phase, call.rotary)[
        0, head // call.heads_per_kv
    ]
    scores = call.scale * torch.einsum("pnd,qsd->pnqs", query, key)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    visible = virtual_mask(call)
    if visible is not None:
        visible = visible.expand(1, call.query.shape[1], -1, -1, -1, -1)[0, head]
        scores = scores.masked_fill(~visible.permute(1, 0, 3, 2), torch.finfo(scores.dtype).min)
    weights = scores.flatten(2).softmax(-1).view_as(scores)
    return weights.transpose(1, 2)
