"""The definition, written to be read beside the paper (arXiv 2602.21371, section 3).

Slow and dense on purpose: every virtual score is there to be looked at. Half precision is computed
in float32, so that this is the truth which every other backend is compared with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iha.call import Call, Refusal
from iha.mixing import rotate_by_phase
from iha.visibility import virtual_mask

if TYPE_CHECKING:
    from jaxtyping import Float

NAME = "reference"


def refusal(call: Call) -> Refusal | None:
    return None


def run(call: Call) -> Tensor:
    with call.without_autocast():
        return _attend(call)


def weights(call: Call) -> Float[Tensor, "B h N Pq S P"]:
    """A[h,n,p,s,q]: one softmax over all (s, q) that (n, p) sees; zeros where it sees nothing."""
    with call.without_autocast():
        return _weights(call)


def _attend(call: Call) -> Tensor:
    A = torch.nn.functional.dropout(_weights(call), call.dropout_p)
    V, av, R = (t.to(A.dtype) for t in (call.value, call.alpha_v, call.collapse))
    V = torch.einsum("bmsd,mgq->bgqsd", V, av).repeat_interleave(call.heads_per_kv, dim=1)
    O = torch.einsum("bhnpsq,bhqsd->bhpnd", A, V)
    collapsed = "bhpnd,hp->bhnd" if R.ndim == 2 else "bhpnd,ohp->bond"
    return torch.einsum(collapsed, O, R).to(call.query.dtype)


def _weights(call: Call) -> Tensor:
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    Q, K, aq, ak = (t.to(dtype) for t in (call.query, call.key, call.alpha_q, call.alpha_k))

    # Q̃[h,p] = Σ_m α^Q[m,h,p] Q[m], and so on: each token has P pseudo-queries, -keys, -values.
    Q = rotate_by_phase(torch.einsum("bmnd,mhp->bhpnd", Q, aq), call.query_phase, call.rotary)
    K = rotate_by_phase(torch.einsum("bmsd,mgq->bgqsd", K, ak), call.phase, call.rotary)
    K = K.repeat_interleave(call.heads_per_kv, dim=1)  # g(h) = ⌊h / (H/G)⌋

    scores = call.scale * torch.einsum("bhpnd,bhqsd->bhnpsq", Q, K)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    visible = virtual_mask(call)
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    # One softmax over all pairs (s, q): this is what interleaving N·P virtual tokens means.
    A = scores.flatten(-2).softmax(-1).view_as(scores)
    return A if visible is None else A * visible  # a query that sees nothing gives zeros
