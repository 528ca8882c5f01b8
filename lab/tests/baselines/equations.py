"""The papers' equations, written out as sums over heads and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Sees = Callable[[int, int, int], bool]  # (batch, query, key)


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def dot(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def plain(query: Tensor, key: Tensor, value: Tensor, sees: Sees, scale: float) -> Tensor:
    out = torch.zeros_like(query)
    B, H, N, _ = query.shape
    for b, h, n in torch.cartesian_prod(*map(torch.arange, (B, H, N))).tolist():
        g = h // (H // key.shape[1])
        tokens = [s for s in range(key.shape[2]) if sees(b, n, s)]
        weights = softmax([scale * dot(query[b, h, n], key[b, g, s]) for s in tokens])
        for s, weight in zip(tokens, weights, strict=True):
            out[b, h, n] += weight * value[b, g, s]
    return out


def talking_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Sees,
    scale: float,
    of_logits: Tensor,
    of_weights: Tensor,
) -> Tensor:
    """Shazeer et al., section 4: J P_l, softmax, W P_w."""
    out = torch.zeros_like(query)
    B, H, N, _ = query.shape
    groups = H // key.shape[1]
    for b, n in torch.cartesian_prod(*map(torch.arange, (B, N))).tolist():
        tokens = [s for s in range(key.shape[2]) if sees(b, n, s)]
        logits = [
            [scale * dot(query[b, h, n], key[b, h // groups, s]) for s in tokens] for h in range(H)
        ]
        weights = [
            softmax(
                [
                    sum(logits[h][i] * float(of_logits[h, l]) for h in range(H))
                    for i in range(len(tokens))
                ]
            )
            for l in range(H)
        ]
        for o in range(H):
            for i, s in enumerate(tokens):
                weight = sum(weights[l][i] * float(of_weights[l, o]) for l in range(H))
                out[b, o, n] += weight * value[b, o // groups, s]
    return out


def differential(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Sees,
    scale: float,
    vectors: tuple[Tensor, Tensor, Tensor, Tensor],  # λ_q1, λ_k1, λ_q2, λ_k2
    layer: int,
) -> Tensor:
    """Ye et al., equations 1 to 3, layers from 0. Pairs are halves: (j, j + H/2)."""
    B, H, N, d = query.shape
    G = key.shape[1]
    start = 0.8 - 0.6 * math.exp(-0.3 * layer)
    q1, k1, q2, k2 = vectors
    balance = math.exp(dot(q1, k1)) - math.exp(dot(q2, k2)) + start
    out = torch.zeros(B, N, H * d, dtype=query.dtype)
    for b, j, n in torch.cartesian_prod(*map(torch.arange, (B, H // 2, N))).tolist():
        tokens = [s for s in range(key.shape[2]) if sees(b, n, s)]
        if not tokens:
            continue
        g = j // (H // G)
        maps = [
            softmax([scale * dot(query[b, j + i, n], key[b, g + l, s]) for s in tokens])
            for i, l in ((0, 0), (H // 2, G // 2))
        ]
        head = torch.zeros(2 * d, dtype=query.dtype)
        for s, first, second in zip(tokens, *maps, strict=True):
            both = torch.cat([value[b, g, s], value[b, g + G // 2, s]])
            head += (first - balance * second) * both
        mean = float((head**2).mean())
        out[b, n, 2 * d * j : 2 * d * (j + 1)] = (1 - start) * head / math.sqrt(mean + 1e-5)
    return out.view(B, N, H, d).transpose(1, 2)


def simplicial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    second_key: Tensor,
    second_value: Tensor,
    sees: Sees,
    scale: float,
    windows: tuple[int, int] | None,
) -> Tensor:
    """Roy et al., equations 5 to 7, and section 6 for the windows."""
    out = torch.zeros_like(query)
    B, H, N, d = query.shape
    w1, w2 = windows or (N, N)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, (B, H, N))).tolist():
        g = h // (H // key.shape[1])
        couples = [
            (s, r)
            for s in range(N)
            for r in range(N)
            if sees(b, n, s) and sees(b, n, r) and abs(n - s) < w1 and abs(n - r) < w2
        ]
        if not couples:
            continue
        weights = softmax(
            [
                scale
                * sum(
                    float(query[b, h, n, l] * key[b, g, s, l] * second_key[b, g, r, l])
                    for l in range(d)
                )
                for s, r in couples
            ]
        )
        for (s, r), weight in zip(couples, weights, strict=True):
            out[b, h, n] += weight * value[b, g, s] * second_value[b, g, r]
    return out


def paired_heads(
    query: Tensor, key: Tensor, value: Tensor, sees: Sees, scale: float, causal: bool
) -> Tensor:
    """Heads j and j + H/2 as one head, whose token 2n + p is token n of head j + p·H/2."""
    out = torch.zeros_like(query)
    B, H, N, _ = query.shape
    G, S = key.shape[1:3]
    for b, j, n, p in torch.cartesian_prod(*map(torch.arange, (B, H // 2, N, 2))).tolist():
        g = j // (H // G)
        tokens = [
            (s, q)
            for s in range(S)
            for q in range(2)
            if sees(b, n, s) and (2 * s + q <= 2 * (S - N + n) + p or not causal)
        ]
        head = query[b, j + p * H // 2, n]
        weights = softmax([scale * dot(head, key[b, g + q * G // 2, s]) for s, q in tokens])
        for (s, q), weight in zip(tokens, weights, strict=True):
            out[b, j + p * H // 2, n] += weight * value[b, g + q * G // 2, s]
    return out
