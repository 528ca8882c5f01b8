"""CPM-3: ⌈√N⌉ heads of IHA bring all N tokens together where the known MHA layer takes N.

The task (paper, section 4.3): for natural numbers x_1 … x_N count, at each i, the ordered pairs
(j1, j2), j1 = j2 included, with x_i + G·x_j1 + x_j2 ≡ 0 (mod M). The tokens are x̂ = [x, I].

The construction is the paper's (appendix B.3). Let T be the cyclic shift, (T X)_i = x_(i-1).

    MHA   W_Q[h] = [0; T^h], W_K[h] = [0; I], W_V[h] = e_1: head h moves the sequence by h.
    IHA   r = ⌈√N⌉ heads, P = r. W_Q[h] = [0; T^(h·r)], W_K[j] = [0; (T^j)ᵀ], W_V[j] = r·e_1 u_jᵀ
          and one-hot routers (`layer.routers`). The scores of query n with all (s, j) are rows of
          T^(h·r + j): one 1 for each j, else 0. Hard attention gives those r the weight 1/r each,
          which W_V undoes: O_h = [T^(h·r) x, …, T^(h·r + r-1) x].

Hard attention is the operator's softmax at scale 100: what should have no weight has e^-100, about
4e-44. Then every token holds all N numbers, rounded to whole ones, and an MLP counts: its first
layer forms x_i + G·x_j1 + x_j2 for all N² pairs, ReLU(1 - (· mod M)) marks the multiples of M, the
second sums.

As in the paper's proof N = N_max. (Its condition G > 2M alone does not make the predicate depend on
order: G = 2M + 1 meets it and is 1 mod M. Our G is neither 0 nor 1 mod M.)
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iha_lab.theory.filters import root
from iha_lab.theory.finding import Finding, Findings
from iha_lab.theory.layer import Layer, routers

LENGTHS = (4, 9, 16, 25)
SEQUENCES = 100
HARD, EXACT = 100.0, 1e-12
M, G = 7, 17


def findings() -> list[Finding]:
    found: list[Finding] = []
    for N in LENGTHS:
        x, r = sequences(N), root(N)
        expected = counts(x)
        layer, plain, few = iha(N), mha(N, N), mha(N, r)
        sizes = f"N={N}, G={G}, M={M}, {len(x)} sequences"
        rows = Findings(sizes, f"wrong counts of {expected.numel()}")
        error = float((workspace(layer, x) - shifts(x, r * r)).abs().max())
        text = "largest error of a number, before rounding"
        rows.at_most(
            EXACT, error, f"IHA with {r} heads brings all {N} numbers to every token", computed=text
        )
        rows.at_most(0, wrong_counts(layer, x, expected), f"IHA with {r} heads counts right")
        rows.at_most(0, wrong_counts(plain, x, expected), f"MHA with {N} heads counts right")
        wrong = wrong_counts(few, x, expected)
        rows.at_least(1, wrong, f"the same MHA construction with {r} heads does not")
        rows.equal(
            2 * r * (N + 1) * N + (N + 1) * r**2 + 4 * r**3,
            layer.parameters(),
            "IHA's parameters: 2⌈√N⌉(N+1)N + (N+1)⌈√N⌉² + 4⌈√N⌉³",
            setting=f"N={N}; MHA has {plain.parameters()}",
        )
        found += rows
    return found


def sequences(N: int) -> Int[Tensor, "B N"]:
    """Draw random natural numbers up to 3M, and add two sequences of one number alone."""
    seeded = torch.Generator().manual_seed(N)
    random = torch.randint(0, 3 * M, (SEQUENCES - 2, N), generator=seeded)
    return torch.cat((random, torch.zeros(1, N).long(), torch.full((1, N), M - 1)))


def counts(x: Int[Tensor, "B N"]) -> Int[Tensor, "B N"]:
    """Count by the definition."""
    i, j1, j2 = x[:, :, None, None], x[:, None, :, None], x[:, None, None, :]
    return ((i + G * j1 + j2) % M == 0).sum((2, 3))


def shifts(x: Int[Tensor, "B N"], number: int) -> Int[Tensor, "B N number"]:
    """Return [x, T x, T² x, …] at every token; from T^N on they repeat."""
    return torch.stack([x.roll(t, 1) for t in range(number)], -1)


def mha(N: int, heads: int) -> Layer:
    """Build MHA whose head h moves the sequence by h."""
    query = torch.stack([_below(_shift(N, h)) for h in range(heads)])
    key = _below(_shift(N, 0)).expand(heads, -1, -1)
    return Layer(query, key, _first(N)[None, :, None].expand(heads, -1, -1))


def iha(N: int, step: int | None = None) -> Layer:
    """Build IHA whose head h moves by h·step + j for all j; the default step, ⌈√N⌉, is right."""
    r = root(N)
    step = r if step is None else step
    route = r * _first(N)[:, None] * torch.eye(r, dtype=torch.float64)[:, None]
    return Layer(
        torch.stack([_below(_shift(N, h * step)) for h in range(r)]),
        torch.stack([_below(_shift(N, j).mT) for j in range(r)]),
        route,
        routers(r),
    )


def workspace(layer: Layer, x: Int[Tensor, "B N"]) -> Float[Tensor, "B N numbers"]:
    """Return what each token holds after the layer, with hard attention."""
    numbers = x[:, :, None].double()
    positions = torch.eye(x.shape[1], dtype=torch.float64).expand(x.shape[0], -1, -1)
    return layer.attend(torch.cat((numbers, positions), -1), scale=HARD)


def wrong_counts(layer: Layer, x: Int[Tensor, "B N"], expected: Int[Tensor, "B N"]) -> int:
    return int((mlp(workspace(layer, x).round(), x.shape[1]) != expected).sum())


def mlp(held: Float[Tensor, "B N numbers"], N: int) -> Float[Tensor, "B N"]:
    """Count from what a token holds: x_i first, then the others in any order.

    A token that holds fewer than N numbers lacks them in the count; of more, which repeat, the
    first N are read.
    """
    readable = torch.eye(held.shape[-1], dtype=held.dtype)[:N]
    pairs = G * readable[:, None] + readable + readable[0]
    summed = held @ pairs.flatten(0, 1).mT
    return torch.relu(1 - summed.remainder(M)).sum(-1)


def _shift(N: int, by: int) -> Float[Tensor, "N N"]:
    """Return T^by."""
    return torch.eye(N, dtype=torch.float64).roll(by, 0)


def _below(matrix: Float[Tensor, "N N"]) -> Float[Tensor, "E N"]:
    """Return [0; matrix], which reads the I of x̂ alone."""
    return torch.cat((torch.zeros_like(matrix[:1]), matrix))


def _first(N: int) -> Float[Tensor, " E"]:
    """Return e_1, which reads the number alone."""
    return torch.eye(1 + N, dtype=torch.float64)[0]
