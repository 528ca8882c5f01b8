"""Where heads look: the attention weights of a call, from the definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iha.backends import reference
from iha.call import Call

if TYPE_CHECKING:
    from jaxtyping import Float

CHUNK = 2**24  # weights that are looked at together


@dataclasses.dataclass(frozen=True)
class AttentionPattern:
    """The weights of one layer on one input; each property computes them anew, head by head.

    `source` is the call of the operator, or the weights (B, H, N, S) of a layer without IHA, and
    `heads` the h of H heads that are shown, in this order.
    """

    source: Call | Float[Tensor, "B H N S"]
    heads: Sequence[int]

    @property
    @torch.no_grad()
    def pairs(self) -> Float[Tensor, "B h N Pq S P"]:
        """A[b,h,n,p,s,q], how much pseudo-query p of token n reads pseudo-key q of token s.

        For each (h, n, p) they sum to one over all (s, q), and to zero where nothing is visible.
        Pseudo-query j is number P - Pq + j. A layer without IHA has Pq = P = 1.
        """
        if isinstance(self.source, Tensor):
            return self.source[:, list(self.heads), :, None, :, None]
        return torch.cat([reference.weights(self.source.of_heads(h, h + 1)) for h in self.heads], 1)

    @property
    @torch.no_grad()
    def tokens(self) -> Float[Tensor, "B h N S"]:
        """T[b,h,n,s] = Σ_p r[h,p] Σ_q A[b,h,n,p,s,q], in the shape of `output_attentions`.

        r[h,p] = Σ_h' |R[h',h,p]| / Σ_h',p |R[h',h,p]| is the share with which the collapse reads
        pseudo-query p of head h (equal shares where it reads none), so rows sum to one as those of
        `pairs` do, and after an exact start they are the plain model's. Signs of R and the mixing
        of values are not in it: it says where a head looks, and not what it adds.
        """
        if isinstance(self.source, Tensor):
            return self.source[:, list(self.heads)]
        return token_weights(self.source, self.heads)


def snapshot(call: Call) -> Call:
    """What stays as it is when the model is trained, or writes to its cache."""
    names = [field.name for field in dataclasses.fields(call)]
    kept = {n: t.detach().clone() for n in names if isinstance(t := getattr(call, n), Tensor)}
    return call.replace(**kept)


def token_weights(call: Call, heads: Sequence[int]) -> Float[Tensor, "B h N S"]:
    """`AttentionPattern.tokens`, with gradients."""
    return torch.cat([_tokens(call.of_heads(h, h + 1)) for h in heads], 1)


def shares(collapse: Float[Tensor, "H h Pq"] | Float[Tensor, "h Pq"]) -> Float[Tensor, "h Pq"]:
    """r[h,p] of `AttentionPattern.tokens`."""
    read = collapse.abs() if collapse.ndim == 2 else collapse.abs().sum(0)
    read = torch.where(read.sum(-1, keepdim=True) > 0, read, torch.ones_like(read))
    return read / read.sum(-1, keepdim=True)


def _tokens(call: Call) -> Float[Tensor, "B 1 N S"]:
    """Of one head: a few query tokens at a time."""
    B, N, S = len(call.query), call.query.shape[2], call.key.shape[2]
    step = max(1, CHUNK // max(1, B * call.pseudo_queries * S * call.pseudo_heads))
    rows = [reference.weights(call.of_queries(n, n + step)).sum(-1) for n in range(0, N, step)]
    share = shares(call.collapse.to(rows[0].dtype))
    with call.without_autocast():
        return torch.cat([torch.einsum("bhnps,hp->bhns", part, share) for part in rows], 2)
