"""MHA ⊆ IHA: an IHA layer that computes what a given MHA (or GQA) layer computes.

Two constructions, both compared with PyTorch's own attention on the same weights.

The paper's (appendix B.1) has no mask and no positions. All α are 1[m=h] for every p, and R selects
the first pseudo-head. Each key then stands P times in the softmax, with weight 1/P of its own
each time, and Σ_{s,q} softmax/P · V[s] = Σ_s softmax · V[s].

With flat causality, as in the paper's Algorithm 1, this first pseudo-query (n, 0) sees all P copies
of earlier tokens but one copy of its own: its own token weighs P times too little. The *last*
pseudo-query sees all P of every visible token, and through a window W·P virtual tokens are W whole
tokens. So `HeadMixing(init="upcycle")` selects the last; and pseudo-values may differ by any ε with
Σ_q ε[m,g,q] = 0, pseudo-queries but the last by anything (docs/design.md, "Exact upcycling").
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from iha import HeadMixing
from iha.call import Causality
from iha_lab.theory.finding import Finding, Findings
from iha_lab.theory.layer import Layer, Mixing, mixing_of, random

EXACT = 1e-12
PSEUDO_HEADS = (1, 2, 3, 4)
N, E, H, D = 12, 16, 4, 8
MASKS: dict[str, tuple[Causality | None, int | None]] = {
    "no mask": (None, None),
    "flat causality": ("flat", None),
    "flat, window 3": ("flat", 3),
    "token causality": ("token", None),
    "token, window 3": ("token", 3),
    "no causality, window 3": (None, 3),
}


REMARK = (
    "The paper's proof has no mask. Under flat causality the first pseudo-query sees one of the P"
    " copies of its own token; the last sees all, as the next rows use."
)


def findings() -> list[Finding]:
    sizes = f"H={H}, P=1…{PSEUDO_HEADS[-1]}, N={N}"
    rows = Findings("", "largest difference from MHA")
    first: tuple[tuple[str, Causality | None, str, str], ...] = (
        ("no mask", None, "the paper's choice: identity mixing, first pseudo-head", ""),
        ("flat causality", "flat", "the same choice under Algorithm 1's causal mask", REMARK),
    )
    for setting, causal, claim, remark in first:
        worst = max(error(select(P, first=True), causal, None) for P in PSEUDO_HEADS)
        rows.at_most(
            EXACT, worst, f"MHA ⊆ IHA, {claim}", setting=f"{setting}, {sizes}", remark=remark
        )
    rows.computed = "largest difference from plain attention"
    for name, (causal, window) in MASKS.items():
        for G in (H, H // 2):
            rows.at_most(
                EXACT,
                max(error(upcycled(P, G), causal, window, G) for P in PSEUDO_HEADS),
                f"{'MHA' if G == H else 'GQA'} ⊆ IHA, last pseudo-head, zero-sum values",
                setting=f"{name}, {sizes}, G={G}",
            )
    return rows


def select(pseudo_heads: int, *, first: bool) -> Mixing:
    """Make identity mixing in which R selects the first pseudo-head or the last."""
    mixing = mixing_of(
        HeadMixing(
            H, num_kv_heads=H, pseudo_heads=pseudo_heads, init="identity", dtype=torch.float64
        )
    )
    collapse = torch.zeros_like(mixing.collapse)
    collapse[:, :, 0 if first else -1] = torch.eye(H)
    return mixing._replace(collapse=collapse)


def upcycled(pseudo_heads: int, num_kv_heads: int) -> Mixing:
    """Make what `iha.upcycle` gives a layer, with noise of the size of the mixing itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(pseudo_heads)
        return mixing_of(
            HeadMixing(
                H,
                num_kv_heads=num_kv_heads,
                pseudo_heads=pseudo_heads,
                value_noise=1.0,
                query_noise=1.0,
                dtype=torch.float64,
                init="upcycle",
            )
        )


def error(mixing: Mixing, causal: Causality | None, window: int | None, G: int = H) -> float:
    """Take the largest |IHA - plain attention| over all outputs, for random weights and tokens."""
    seeded = torch.Generator().manual_seed(0)
    x = random(seeded, 2, N, E)
    weights = [random(seeded, heads, E, D) / E**0.5 for heads in (H, G, G)]
    layer = Layer(*weights, mixing=mixing)
    plain = scaled_dot_product_attention(
        *layer.heads(x), attn_mask=token_mask(causal, window), enable_gqa=True
    )
    expected = plain.transpose(1, 2).flatten(2)
    return float((layer.attend(x, causal=causal, window=window) - expected).abs().max())


def token_mask(causal: Causality | None, window: int | None) -> Bool[Tensor, "N N"]:
    """Write out what a plain layer sees: s ≤ n if causal, |n - s| < W in a window."""
    distance = torch.arange(N)[:, None] - torch.arange(N)
    visible = distance.abs() < (N if window is None else window)
    return visible if causal is None else visible & (distance >= 0)
