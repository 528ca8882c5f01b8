"""P² patterns a head: how many linearly independent attention patterns it really has.

An MHA head applies one N×N pattern to its values. An IHA head has a pattern A[p,q] for each
pseudo-query p and pseudo-key q, and the values of pseudo-head q go through it into output p:

    Õ[p] = Σ_q A[p,q] Ṽ[q],    O = Σ_p R[p] Õ[p].

So the operator itself says what A[p,q] is: with the identity for values, α^V that keeps
pseudo-value q alone and R that takes pseudo-query p alone, O = A[p,q]. The number of patterns is
the numerical rank of all P² of them, each as a vector of N² numbers: singular values above 1e-8 of
the largest.

The claim is "up to P²". For random weights and mixing P² is reached, also where P > H [found]: the
softmax makes patterns independent. The scores before it are not: Q̃[p] K̃[q]ᵀ is a combination of the
H² products Q_m K_m'ᵀ, and has the form a ⊗ b in them, so their rank is min(P, H)².
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from iha_lab.theory.finding import Finding, Findings
from iha_lab.theory.layer import Layer, Mixing, random

PSEUDO_HEADS = (1, 2, 3, 4, 5, 6)
N, E, H, D = 24, 16, 4, 8  # H·P² patterns need N² ≥ H·P²
NEGLIGIBLE = 1e-8


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Independent patterns for one P: of a head, of the whole layer, of a head without softmax."""

    pseudo_heads: int
    head: int
    layer: int
    head_scores: int


def findings(mha: Ranks, iha: Sequence[Ranks]) -> list[Finding]:
    """`mha` is `ranks(None)`, `iha` has `ranks(random_mixing(P))` for several P."""
    found = Findings(f"H={H}, N={N}")
    found.equal(1, mha.head, "an MHA head has 1 pattern", f"|{mha.head} - 1|")
    found.equal(H, mha.layer, "an MHA layer has H", f"|{mha.layer} - H|")
    for one in iha:
        P = one.pseudo_heads
        scores = min(P, H) ** 2
        for claim, rank, wanted in (
            (f"an IHA head has P² = {P * P} patterns", one.head, P * P),
            (f"an IHA layer has H·P² = {H * P * P}", one.layer, H * P * P),
            (f"without softmax a head has min(P, H)² = {scores}", one.head_scores, scores),
        ):
            setting = f"{found.setting}, P={P}"
            found.equal(wanted, rank, claim, f"|rank {rank} - {wanted}|", setting=setting)
    return found


def random_mixing(pseudo_heads: int) -> Mixing:
    seeded = torch.Generator().manual_seed(pseudo_heads)
    return Mixing(*(random(seeded, H, H, pseudo_heads) / H**0.5 for _ in range(4)))


def ranks(mixing: Mixing | None) -> Ranks:
    """Take the numerical ranks of the patterns of a layer with random weights; None is MHA."""
    seen = patterns(mixing)
    scores = patterns(mixing, linear=True)
    pseudo_heads = 1 if mixing is None else mixing.alpha_q.shape[2]
    return Ranks(pseudo_heads, rank(seen[:1]), rank(seen), rank(scores[:1]))


def patterns(mixing: Mixing | None, *, linear: bool = False) -> Float[Tensor, "H PP N N"]:
    """Read all patterns of all heads out of the operator; or the scores, without its softmax."""
    seeded = torch.Generator().manual_seed(0)
    tokens = torch.cat((random(seeded, N, E), torch.eye(N, dtype=torch.float64)), -1)[None]
    nothing = torch.zeros(H, N, D, dtype=torch.float64)
    w_q, w_k = (torch.cat((random(seeded, H, E, D) / E**0.5, nothing), 1) for _ in range(2))
    positions = torch.eye(E + N, dtype=torch.float64)[:, E:].expand(H, -1, -1)
    found: list[Tensor] = []
    for reading in _readings(mixing):
        layer = Layer(w_q, w_k, positions, reading)
        out = layer.attend_linearly(tokens) if linear else layer.attend(tokens, scale=1.0)
        found.append(out[0].unflatten(1, (H, N)).transpose(0, 1))
    return torch.stack(found, 1)


def _readings(mixing: Mixing | None) -> list[Mixing | None]:
    """Return, for each (p, q), the mixing whose output is A[p, q]."""
    if mixing is None:
        return [None]
    P, eye = mixing.alpha_q.shape[2], torch.eye(H, dtype=torch.float64)
    only = [eye[:, :, None] * torch.eye(P, dtype=torch.float64)[p] for p in range(P)]
    return [mixing._replace(alpha_v=only[q], collapse=only[p]) for p in range(P) for q in range(P)]


def rank(seen: Float[Tensor, "h PP N N"]) -> int:
    """Take the rank of all these patterns together."""
    vectors = seen.flatten(0, 1).flatten(1)
    return int(torch.linalg.matrix_rank(vectors, rtol=NEGLIGIBLE))
