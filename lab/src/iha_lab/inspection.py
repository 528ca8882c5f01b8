"""What training has done to the mixing of a model, and where its heads look: in numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import iha
from iha import HeadMixing
from iha.hf.attention_modules import attention_layers
from iha.patterns import shares

if TYPE_CHECKING:
    from jaxtyping import Float

LITTLE = 0.01  # of the largest of its kind: what counts as nothing


@dataclasses.dataclass(frozen=True)
class Talk:
    """Who talks to whom: in each map a row is who listens, a column who is heard; rows sum to one.

    queries (H, H): Σ_p r[h,p] |α^Q[m,h,p]|, with the shares r of `iha.AttentionPattern.tokens`.
    keys (G, G): Σ_q |α^K[m,g,q]|.
    values (G, G): |Σ_q α^V[m,g,q]|, so that a zero-sum part, which a start has, does not count.
    outputs (H, H): Σ_p |R[h',h,p]|.
    """

    queries: Float[Tensor, "H H"]
    keys: Float[Tensor, "G G"]
    values: Float[Tensor, "G G"]
    outputs: Float[Tensor, "H H"]

    def strongest(self, count: int) -> list[tuple[str, int, int, float]]:
        """(map, who listens, who is heard, weight) of the strongest between two heads."""
        found: list[tuple[str, int, int, float]] = []
        for field in dataclasses.fields(self):
            table: Tensor = getattr(self, field.name)
            edges = [(i, j) for i in range(len(table)) for j in range(len(table)) if i != j]
            found += [(field.name, i, j, float(table[i, j])) for i, j in edges]
        return sorted(found, key=lambda edge: -edge[3])[:count]


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer with a mixing, on one prompt.

    Attributes:
        name: of its attention module.
        pseudo_heads, pseudo_queries: P and Pq.
        ranks: `effective_rank` of each head, between 1 and Pq·P.
        distances: (H, 4), see `distances`.
        talk: see `Talk`.
        unread: pseudo-queries (h, p) that R does not read: the norm of R[:, h, p] is below 1 % of
            the layer's largest. They cost time and do nothing; the first ones can be dropped
            (`iha.drop_unread_queries`) once they are zero.
        ignored: pseudo-keys (g, q) that get below 1 % of 1/P of the weight on this prompt.
    """

    name: str
    pseudo_heads: int
    pseudo_queries: int
    ranks: list[float]
    distances: Float[Tensor, "H 4"]
    talk: Talk
    unread: list[tuple[int, int]]
    ignored: list[tuple[int, int]]


def mixing_layers(model: Any) -> dict[str, HeadMixing]:
    """Map the name of each attention module with a mixing to its `HeadMixing`."""
    modules: dict[str, Any] = {layer.name: layer.module for layer in attention_layers(model)}
    found = {name: getattr(module, "head_mixing", None) for name, module in modules.items()}
    return {name: mixing for name, mixing in found.items() if isinstance(mixing, HeadMixing)}


@torch.no_grad()
def inspect(
    model: Any, inputs: Mapping[str, Any], layers: Sequence[int | str] | None = None
) -> Iterator[LayerReport]:
    """Look at each layer with a mixing, one after the other; the model runs once.

    Raises ValueError if the model has no mixing tensors, or none in these layers.
    """
    iha.mixing_parameters(model)
    mixings = mixing_layers(model)
    patterns = iha.attention_patterns(model, inputs, layers)
    if not any(name in mixings for name in patterns):
        raise ValueError(f"layers chooses no layer with IHA; those are {', '.join(mixings)}.")
    for name, pattern in patterns.items():
        if (mixing := mixings.get(name)) is None:
            continue
        of_heads = [dataclasses.replace(pattern, heads=[h]) for h in pattern.heads]
        ranks: list[float] = []
        read = torch.zeros(mixing.num_kv_heads, mixing.pseudo_heads)
        for h, head in enumerate(of_heads):
            pairs = head.pairs
            ranks.append(effective_rank(pairs[:, 0]))
            group = h * mixing.num_kv_heads // mixing.num_heads
            read[group] += pairs.sum(4).mean((0, 1, 2, 3)).cpu()
        least = LITTLE / mixing.pseudo_heads * mixing.num_heads / mixing.num_kv_heads
        yield LayerReport(
            name=name,
            pseudo_heads=mixing.pseudo_heads,
            pseudo_queries=mixing.pseudo_queries,
            ranks=ranks,
            distances=distances(mixing),
            talk=talk(mixing),
            unread=unread(mixing),
            ignored=[(int(g), int(q)) for g, q in (read < least).nonzero()],
        )


def effective_rank(pairs: Float[Tensor, "B N Pq S P"]) -> float:
    """How many different patterns a head has: between 1 and Pq·P.

    exp(-Σ_i σ̂_i ln σ̂_i) with σ̂ the singular values, divided by their sum, of the matrix whose
    Pq·P rows are the maps A[p, q] over all tokens (Roy and Vetterli, "The effective rank",
    EUSIPCO 2007). Equal maps count as one; k maps of equal size that are nowhere both positive
    count as k.
    """
    maps = pairs.permute(2, 4, 0, 1, 3).flatten(2).flatten(0, 1).double()
    values = torch.linalg.eigvalsh(maps @ maps.T).clamp(min=0).sqrt()
    values = values / values.sum()
    return math.exp(-float(torch.special.xlogy(values, values).sum()))


def distances(mixing: HeadMixing) -> Float[Tensor, "H 4"]:
    """How far α^Q, α^K, α^V and R of each head are from the nearest exact start; 0 is exact.

    Only what makes a start exact counts (docs/definition.md, "Exact upcycling"), so neither the
    free pseudo-queries nor a zero-sum part of α^V do:

        α^Q: ‖α^Q[:,h,P-1] - e_h‖          α^K: ‖α^K[:,g,:] - e_g‖ / √P
        α^V: ‖mean_q α^V[:,g,q] - e_g‖     R: ‖R[:,h,:] - e_h at p = P-1, 0 elsewhere‖

    in Frobenius norms, with e_h the unit vector of h and g the key/value head of h. At 1, a head
    has moved by as much as it was. A layer that began otherwise (`init="scratch"`) has a distance
    from the first step on.
    """
    H, G, P = mixing.num_heads, mixing.num_kv_heads, mixing.pseudo_heads
    tensors = (mixing.alpha_q, mixing.alpha_k, mixing.alpha_v, mixing.collapse)
    aq, ak, av, R = (tensor.detach().double().cpu() for tensor in tensors)
    eye = torch.eye(G, dtype=torch.float64)
    start = torch.zeros(H, H, mixing.pseudo_queries, dtype=torch.float64)
    start[:, :, -1] = torch.eye(H)
    if R.ndim == 2:
        R = torch.diag_embed(R.T).permute(1, 2, 0)
    of_keys = (ak - eye[:, :, None]).norm(dim=(0, 2)) / math.sqrt(P)
    of_values = (av.mean(-1) - eye).norm(dim=0)
    of_kv = [of.repeat_interleave(H // G) for of in (of_keys, of_values)]
    of_queries = (aq[:, :, -1] - torch.eye(H)).norm(dim=0)
    return torch.stack((of_queries, *of_kv, (R - start).norm(dim=(0, 2))), dim=1)


def talk(mixing: HeadMixing) -> Talk:
    """Read off the mixing tensors who talks to whom."""
    tensors = (mixing.alpha_q, mixing.alpha_k, mixing.alpha_v, mixing.collapse)
    aq, ak, av, R = (tensor.detach().double().cpu() for tensor in tensors)
    aq, ak, av, R = aq.abs(), ak.abs().sum(2).T, av.sum(2).abs().T, R.abs()
    outputs = torch.eye(mixing.num_heads) if R.ndim == 2 else R.sum(2)
    maps = (torch.einsum("mhp,hp->hm", aq, shares(R)), ak, av, outputs)
    return Talk(*(m / m.sum(1, keepdim=True).clamp(min=1e-30) for m in maps))


def unread(mixing: HeadMixing) -> list[tuple[int, int]]:
    """Pseudo-queries (h, p) that no output head reads; p counts from P - Pq."""
    R = mixing.collapse.detach().double().cpu()
    read = R.abs() if R.ndim == 2 else R.norm(dim=0)
    first = mixing.pseudo_heads - mixing.pseudo_queries
    found = (read <= LITTLE * read.max()).nonzero()
    return [(int(h), int(p) + first) for h, p in found]


@torch.no_grad()
def to_exact_start(model: Any) -> Any:
    """Put every mixing back where it computes plain attention, in place; return the model."""
    for mixing in mixing_layers(model).values():
        start = HeadMixing(
            mixing.num_heads,
            num_kv_heads=mixing.num_kv_heads,
            pseudo_heads=mixing.pseudo_heads,
            pseudo_queries=mixing.pseudo_queries,
            per_head_collapse=mixing.per_head_collapse,
            value_noise=0,
            query_noise=0,
            init="upcycle",
        )
        mixing.load_state_dict(start.state_dict())
    return model
