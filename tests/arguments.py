"""Random arguments of the operator, for property tests."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

NAMES = ("query", "key", "value", "alpha_q", "alpha_k", "alpha_v", "collapse")


def tensors(
    *,
    B: int = 2,
    H: int = 4,
    G: int | None = None,
    N: int = 7,
    S: int | None = None,
    d: int = 4,
    P: int = 3,
    Pq: int | None = None,
    per_head: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The seven tensors of a call, with random mixing."""
    G, S, Pq = H if G is None else G, N if S is None else S, P if Pq is None else Pq
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    collapse = (H, Pq) if per_head else (H, H, Pq)
    return {
        "query": draw(B, H, N, d),
        "key": draw(B, G, S, d),
        "value": draw(B, G, S, d),
        "alpha_q": draw(H, H, Pq) / H**0.5,
        "alpha_k": draw(G, G, P) / G**0.5,
        "alpha_v": draw(G, G, P) / G**0.5,
        "collapse": draw(*collapse) / (H * Pq) ** 0.5,
    }


@st.composite
def arguments(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype = torch.float64,
    window: bool | None = None,
    softcap: bool = False,
) -> dict[str, Any]:
    """Every argument that changes what is computed, except dropout. `window` True forces one."""
    G, groups, P = (draw(st.integers(1, 3)) for _ in range(3))
    B, N, d = draw(st.integers(1, 2)), draw(st.integers(1, 9)), 2 * draw(st.integers(1, 3))
    S, Pq = N + draw(st.integers(0, 6)), draw(st.integers(1, P))
    seed = draw(st.integers(0, 2**16))
    random = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = tensors(
        B=B, H=G * groups, G=G, N=N, S=S, d=d, P=P, Pq=Pq, per_head=draw(st.booleans()),
        dtype=dtype, seed=seed,
    )  # fmt: skip
    found["causal"] = draw(st.sampled_from(["flat", "token", None]))
    if window or (window is None and draw(st.booleans())):
        found["window"] = draw(st.integers(1, S if window is None else max(S - 1, 1)))
    if draw(st.booleans()):
        offset = draw(st.integers(0, S - N))
        found["query_offset"] = torch.tensor(offset) if draw(st.booleans()) else offset
    if draw(st.booleans()):
        shape = [size if draw(st.booleans()) else 1 for size in (B, G * groups, N, S)]
        found["attn_mask"] = torch.rand(shape, generator=random) < 0.7
    if draw(st.booleans()):
        found["document_ids"] = torch.randint(0, 3, (B, S), generator=random).sort(-1).values
    if draw(st.booleans()):
        angle = torch.rand(P, draw(st.integers(1, d // 2)), generator=random) * 6
        found["phase"] = (angle.cos(), angle.sin())
        found["rotary"] = draw(st.sampled_from(["half", "pairs"]))
    if draw(st.booleans()):
        found["scale"] = draw(st.floats(0.1, 2.0))
    if softcap and draw(st.booleans()):
        found["softcap"] = draw(st.floats(0.5, 5.0))
    return found
