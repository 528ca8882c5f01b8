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


def explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Sees,
    scale: float,
    of_keys: Tensor,
    of_values: Tensor,
) -> Tensor:
    """Peng et al., equations 10 to 12."""
    mixed_key, mixed_value = torch.zeros_like(key), torch.zeros_like(value)
    G = key.shape[1]
    for g, f in torch.cartesian_prod(torch.arange(G), torch.arange(G)).tolist():
        mixed_key[:, f] += of_keys[g, f] * key[:, g]
        mixed_value[:, f] += of_values[g, f] * value[:, g]
    out = plain(query, mixed_key, mixed_value, sees, scale)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, out.shape[:3])).tolist():
        out[b, h, n] /= math.sqrt(float((out[b, h, n] ** 2).mean()) + 1e-5)
    return out


def convolved(maps: Tensor, b: int, sees: Sees, kernel: Tensor) -> Tensor:
    """Of one sequence: Σ over earlier queries and keys around, of those that all see."""
    H, N, _ = maps.shape
    out = torch.zeros_like(maps)
    queries, keys = kernel.shape[1:]
    for h, n, s in torch.cartesian_prod(*map(torch.arange, (H, N, N))).tolist():
        for i, j in torch.cartesian_prod(torch.arange(queries), torch.arange(keys)).tolist():
            m, r = n - i, s + j - keys // 2
            inside = m >= 0 and 0 <= r < N
            if inside and sees(b, n, m) and sees(b, m, r) and sees(b, n, r):
                out[h, n, s] += kernel[h, i, j] * maps[h, m, r]
    return out


def multi_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Sees,
    scale: float,
    kernels: Tensor,
    mixing: Tensor,
    norm: Tensor,
    gate: Tensor,
    bias: float,
) -> Tensor:
    """Golovneva et al., equations 4, 6 and 7, and their code's norm and gate."""
    out = torch.zeros_like(query)
    B, H, N, d = query.shape
    groups = H // key.shape[1]
    for b in range(B):
        scores = torch.zeros(H, N, N, dtype=query.dtype)
        for h, n, s in torch.cartesian_prod(*map(torch.arange, (H, N, N))).tolist():
            scores[h, n, s] = scale * dot(query[b, h, n], key[b, h // groups, s])
        logits = convolved(scores, b, sees, kernels[0])
        if len(kernels) == 2:
            logits = torch.stack(
                [sum(mixing[1, h, o] * logits[h] for h in range(H)) for o in range(H)]
            )
        weights = torch.zeros_like(logits)
        for h, n in torch.cartesian_prod(torch.arange(H), torch.arange(N)).tolist():
            tokens = [s for s in range(N) if sees(b, n, s)]
            found = softmax([float(logits[h, n, s]) for s in tokens])
            weights[h, n, tokens] = torch.tensor(found, dtype=query.dtype)
        if len(kernels) == 2:
            weights = convolved(weights, b, sees, kernels[1])
        for o, n in torch.cartesian_prod(torch.arange(H), torch.arange(N)).tolist():
            head = torch.zeros(d, dtype=query.dtype)
            for s in (s for s in range(N) if sees(b, n, s)):
                weight = sum(mixing[0, h, o] * weights[h, n, s] for h in range(H))
                head += weight * value[b, o // groups, s]
            head = norm * head / math.sqrt(float((head**2).mean()) + 1e-5)
            out[b, o, n] = head / (1 + math.exp(-dot(head, gate) - bias))
    return out


def composable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Sees,
    scale: float,
    states: Tensor,
    first: Tensor,  # (4·K, E), a linear layer's
    second: Tensor,  # (4, K, 2·R, H)
    gates: Tensor,  # (4·H, E)
    base: Tensor,  # (2, H, H)
) -> Tensor:
    """Xiao et al., section 3: Compose before and after the softmax."""
    out = torch.zeros_like(query)
    B, H, N, _ = query.shape
    groups = H // key.shape[1]
    _, K, ranks, _ = second.shape
    R = ranks // 2

    def matrix(b: int, t: int, c: int) -> Tensor:
        """What token t adds to the composition c, as one (H, H) matrix."""
        hidden = [dot(states[b, t], first[c * K + k]) for k in range(K)]
        hidden = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in hidden]
        w = [sum(x * second[c, k, r] for k, x in enumerate(hidden)) for r in range(ranks)]
        found = torch.zeros(H, H, dtype=query.dtype)
        for r in range(R):
            column = w[r] / math.sqrt(float((w[r] ** 2).mean()) + 1e-6)
            found += torch.outer(column, w[R + r])
        for h in range(H):
            found[h, h] += math.tanh(dot(states[b, t], gates[c * H + h]))
        return found

    for b, n in torch.cartesian_prod(torch.arange(B), torch.arange(N)).tolist():
        tokens = [s for s in range(N) if sees(b, n, s)]
        of_keys = [[matrix(b, s, c) for c in (1, 3)] for s in tokens]
        of_query = [matrix(b, n, c) for c in (0, 2)]
        logits = []
        for i, s in enumerate(tokens):
            scores = [scale * dot(query[b, h, n], key[b, h // groups, s]) for h in range(H)]
            logits.append(
                torch.tensor(scores, dtype=base.dtype) @ (base[0] + of_query[0] + of_keys[i][0])
            )
        weights = [softmax([float(logit[h]) for logit in logits]) for h in range(H)]
        for i, s in enumerate(tokens):
            both = torch.tensor([weights[h][i] for h in range(H)], dtype=base.dtype)
            both = both @ (base[1] + of_query[1] + of_keys[i][1])
            for h in range(H):
                out[b, h, n] += both[h] * value[b, h // groups, s]
    return out
