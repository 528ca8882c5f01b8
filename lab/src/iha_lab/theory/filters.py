"""Polynomial filters [X, AX, …, A^(k-1) X]: ⌈√k⌉ heads of IHA do what takes k of MHA.

The task: A is a fixed N×N matrix, X any N×d one; the tokens are x̂ = [X, I]. The layers are linear
attention, Q Kᵀ V without softmax, as in the paper (appendix B.2), whose construction this is.

    MHA   W_Q[h] = [0; A^h], W_K[h] = [0; I], W_V[h] = [I; 0]. Head h computes A^h X.
    IHA   r = ⌈√k⌉ heads, P = r. W_Q[h] = [0; A^(h·r)], W_K[j] = [0; (A^j)ᵀ], W_V[j] = [L_j; 0] with
          L_j writing X into block j of r. One-hot routers (`layer.routers`) let head h read all r
          keys, so O_h = Σ_j A^(h·r) A^j X L_j = [A^(h·r) X, …, A^(h·r + r-1) X].

Why not fewer heads of MHA (the paper's argument): a head whose values read X, not the positions,
gives S_h X B_h, of rank d at most, and H heads give rank H·d; the filter bank has rank k·d. By
Eckart and Young the distance from all matrices of rank H·d is what is left of the singular values.

The operator has a softmax. The linear form goes through its own mixing, interleaving and collapse,
with a product in place of the softmax (`Layer.attend_linearly`). Ours is the limit *with* softmax,
through the whole operator: P = 2r, pseudo-keys and -values of both signs, ±K_j and ±V_j, and a
small scale ε. With S_j = A^(h·r + j)

    Õ = Σ_j Σ_s sinh(ε S_j) V_j / Σ_j Σ_s cosh(ε S_j) = ε/(N r) · Σ_j S_j V_j + O(ε³),

and R multiplies by N r/ε: the filter bank with an error O(ε²), until rounding, which R multiplies
too, is larger.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from iha_lab.theory.finding import Finding, Findings
from iha_lab.theory.layer import Layer, Mixing, random, routers

EXACT = 1e-12
ORDERS = (4, 9, 16, 25)
N, D = 64, 2  # k·d < N, as the theorem wants
EPSILON, NEAR = 1e-4, 1e-6


@dataclasses.dataclass(frozen=True)
class Count:
    """Parameters of both constructions for one k, and what the paper's formulas say."""

    k: int
    iha: int
    mha: int
    iha_formula: int
    mha_formula: int


def findings(counts: Sequence[Count]) -> list[Finding]:
    """`counts` are those of `parameter_counts` for `ORDERS` or more."""
    A, X = problem()
    by_order = {count.k: count for count in counts}
    found: list[Finding] = []
    for k in ORDERS:
        r, target, count = root(k), filter_bank(A, X, k), by_order[k]
        few, many = iha(A, r), mha(A, k)
        rows = Findings(f"k={k}, N={N}, d={D}", "largest error of a block A^i X, relative")
        error = block_error(few.attend_linearly(tokens(X)), target)
        rows.at_most(EXACT, error, f"IHA with {r} heads is the filter bank (linear attention)")
        error = block_error(many.attend_linearly(tokens(X)), target)
        rows.at_most(EXACT, error, f"MHA with {k} heads is too (linear attention)")
        rows.at_least(
            0.1,
            distance_from_rank(target, r * D),
            f"MHA with {r} heads whose values read X is not: rank {r}·d < k·d",
            computed="distance from all matrices of that rank, relative",
        )
        rows.at_most(
            NEAR,
            block_error(near_linear(few, EPSILON).attend(tokens(X), scale=EPSILON), target),
            f"IHA with {r} heads, through the whole operator with softmax, in the limit (ours)",
            setting=f"{rows.setting}, P={2 * r}, ε={EPSILON:g}",
        )
        formula = "IHA's parameters: 2N(N+d)⌈√k⌉ + d(N+d)⌈√k⌉² + 4⌈√k⌉³"
        rows.equal(count.iha_formula, count.iha, formula)
        rows.equal(count.mha_formula, count.mha, "MHA's parameters: 2N(N+d)k + d(N+d)k")
        found += rows
    first, last = by_order[ORDERS[0]], by_order[ORDERS[-1]]
    rows = Findings(f"k={first.k} to {last.k}, N={N}, d={D}")
    for claim, wanted, growth in (
        ("IHA's parameters grow as √k", 0.5, last.iha / first.iha),
        ("MHA's parameters grow as k", 1.0, last.mha / first.mha),
    ):
        exponent = math.log(growth) / math.log(last.k / first.k)
        computed = f"|exponent {exponent:.3f} - {wanted}| of the count"
        rows.at_most(0.05, abs(exponent - wanted), claim, computed=computed)
    return found + rows


def root(k: int) -> int:
    """Return ⌈√k⌉."""
    return math.isqrt(k - 1) + 1


def problem(seed: int = 0) -> tuple[Float[Tensor, "N N"], Float[Tensor, "N d"]]:
    """Draw a directed graph's adjacency, three signed edges per node, spectral radius 1; and X."""
    seeded = torch.Generator().manual_seed(seed)
    eye = torch.eye(N, dtype=torch.float64)
    edges = [eye[torch.randperm(N, generator=seeded)] for _ in range(3)]
    signs = [random(seeded, N, 1).sign() for _ in edges]
    A = sum((sign * edge for sign, edge in zip(signs, edges, strict=True)), torch.zeros_like(eye))
    return A / torch.linalg.eigvals(A).abs().max(), random(seeded, N, D)


def tokens(X: Float[Tensor, "N d"]) -> Float[Tensor, "1 N E"]:
    """Return x̂ = [X, I], a batch of one."""
    return torch.cat((X, torch.eye(N, dtype=X.dtype)), -1)[None]


def filter_bank(A: Float[Tensor, "N N"], X: Float[Tensor, "N d"], k: int) -> Float[Tensor, "N kd"]:
    """Return [X, AX, …], each from the one before."""
    blocks = [X]
    for _ in range(k - 1):
        blocks.append(A @ blocks[-1])
    return torch.cat(blocks, -1)


def mha(A: Float[Tensor, "N N"], heads: int) -> Layer:
    """Build MHA whose head h computes A^h X."""
    own = torch.eye(N + D, D, dtype=A.dtype).expand(heads, -1, -1)
    key = _below(torch.eye(N, dtype=A.dtype)).expand(heads, -1, -1)
    return Layer(torch.stack([_below(_power(A, h)) for h in range(heads)]), key, own)


def iha(A: Float[Tensor, "N N"], heads: int) -> Layer:
    """Build IHA whose head h computes [A^(h·r) X, …, A^(h·r + r-1) X], r = `heads`."""
    route = torch.zeros(heads, N + D, heads, D, dtype=A.dtype)
    for j in range(heads):
        route[j, :D, j] = torch.eye(D)
    return Layer(
        torch.stack([_below(_power(A, h * heads)) for h in range(heads)]),
        torch.stack([_below(_power(A, j).mT) for j in range(heads)]),
        route.flatten(2),
        routers(heads),
    )


def near_linear(layer: Layer, epsilon: float) -> Layer:
    """Give a layer keys and values of both signs, for softmax at scale ε."""
    H = layer.w_q.shape[0]
    query, key, value, collapse = routers(H)
    nothing = torch.zeros_like(query)
    return dataclasses.replace(
        layer,
        mixing=Mixing(
            torch.cat((query, nothing), -1),
            torch.cat((key, -key), -1),
            torch.cat((value, -value), -1),
            torch.cat((collapse, nothing), -1) * (N * H / epsilon),
        ),
    )


def block_error(out: Float[Tensor, "1 N width"], target: Float[Tensor, "N kd"]) -> float:
    """Take the largest error of a block, relative to its largest entry; padding is left out."""
    blocks = target.unflatten(1, (-1, D))
    found = out[0, :, : target.shape[1]].unflatten(1, (-1, D))
    worst, size = ((t.abs().amax((0, 2))) for t in (found - blocks, blocks))
    return float((worst / size).max())


def distance_from_rank(target: Float[Tensor, "N kd"], rank: int) -> float:
    """Return ‖target - M‖ / ‖target‖ for the nearest M of that rank (Frobenius)."""
    values = torch.linalg.svdvals(target)
    return float(values[rank:].norm() / values.norm())


def parameter_counts(orders: Sequence[int]) -> list[Count]:
    """Build both constructions, and count their numbers."""
    A, _ = problem()
    found: list[Count] = []
    for k in orders:
        r = root(k)
        formula = 2 * N * (N + D) * r + D * (N + D) * r**2 + 4 * r**3
        mha_formula = 2 * N * (N + D) * k + D * (N + D) * k
        layers = iha(A, r).parameters(), mha(A, k).parameters()
        found.append(Count(k, *layers, formula, mha_formula))
    return found


def limit_errors(epsilons: Sequence[float], k: int = 9) -> list[float]:
    """Measure the error of the construction with softmax for each scale ε."""
    A, X = problem()
    target, layer = filter_bank(A, X, k), iha(A, root(k))
    outputs = (near_linear(layer, e).attend(tokens(X), scale=e) for e in epsilons)
    return [block_error(out, target) for out in outputs]


def _power(A: Float[Tensor, "N N"], exponent: int) -> Float[Tensor, "N N"]:
    return torch.linalg.matrix_power(A, exponent)


def _below(matrix: Float[Tensor, "N N"]) -> Float[Tensor, "E N"]:
    """Return [0; matrix], which reads the I of x̂ alone."""
    return torch.cat((torch.zeros(D, N, dtype=matrix.dtype), matrix))
