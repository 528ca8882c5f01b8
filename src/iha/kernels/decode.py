"""A few queries against a long cache, read once: split over the keys, merged by log-sum-exp.

Pseudo-keys and -values are never made. Mixing is linear, so it moves to the other side of each
product ("absorbed"), where there are few rows:

    Q̃[c,n]·rotate(Σ_m α^K[m,q] K[m,s], q)  =  Σ_m ( α^K[m,q]·rotate(Q̃[c,n], -q) ) · K[m,s]
    Σ_s w[s,q] Σ_m α^V[m,q] V[m,s]       =  Σ_m Σ_s ( α^V[m,q]·w[s,q] ) V[m,s]

A row r is a triple (c, q, n): a pseudo-query c = (h, p) of token n, and the pseudo-key index q that
it looks at, r = (c·P + q)·N + n. So a row is an ordinary attention over the S cached tokens, with
heads of G·d dimensions, and base keys and values are the operands of the matrix products as they
lie in the cache. The one softmax over all pairs (s, q) is a merge over q as well as over splits.

A serving engine's cache is addressed through a block table, with a length per sequence. Tokens that
nobody sees are never read there: their pages may be given back and hold anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iha.kernels import tiles, visibility


@triton.jit
def phase_of(table, p, direction: tl.constexpr, spec: tl.constexpr):
    j = tl.arange(0, spec.columns)
    inside = (j < spec.half)[None, :]
    return tl.load(table + p[:, None] * spec.half + j[None, :], mask=inside, other=0.0) * direction


@triton.jit
def head_tokens(heads, b, m, s, exists, spec: tl.constexpr):
    """Tokens s of base head m, as they lie in memory, in halves."""
    j = tl.arange(0, spec.columns)
    inside = exists[:, None] & (j < spec.half)[None, :]
    line = heads.pointer + b.to(tl.int64) * heads.batch + m * heads.head
    line = (line + s.to(tl.int64) * heads.token)[:, None]
    first, second = tiles.dimensions(j, 0, spec), tiles.dimensions(j, 1, spec)
    h1 = tl.load(line + first[None, :], mask=inside, other=0.0)
    h2 = tl.load(line + second[None, :], mask=inside, other=0.0)
    return h1, h2


@triton.jit
def cached_tokens(x, heads, b, m, s, exists, spec: tl.constexpr):
    """`head_tokens` of keys or values, wherever the pages of sequence b lie."""
    if spec.page is None:
        return head_tokens(heads, b, m, s, exists, spec)
    else:  # written out: Triton wants one type of what follows a return
        entry = x.table + b.to(tl.int64) * x.table_batch + s // spec.page
        block = tl.load(entry, mask=exists, other=0)
        return head_tokens(heads, block, m, s % spec.page, exists, spec)


@triton.jit
def extent(x, b, spec: tl.constexpr):
    """How many key tokens there are, and the position of the first query."""
    if spec.page is None:
        return x.S, visibility.query_offset(x, spec)
    else:  # written out: Triton wants one type of what follows a return
        S = tl.load(x.lengths + b)
        return S, S - x.N


@triton.jit
def token_range(x, split, splits, S, offset, tokens: tl.constexpr, spec: tl.constexpr):
    """A split's share of the key tokens that the N queries may see, by position."""
    low, high = 0, S
    if spec.window is not None:
        # Only under flat causality the token a window back is still seen, in part.
        low = tl.maximum(low, offset - spec.window + (0 if spec.causal == "flat" else 1))
    if spec.causal is not None:
        high = tl.minimum(high, offset + x.N)
    elif spec.window is not None:
        high = tl.minimum(high, offset + x.N - 1 + spec.window)
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), tokens), splits) * tokens
    return low + split * share, tl.minimum(low + (split + 1) * share, high)


@triton.jit
def decode_kernel(
    x, partial, log_sum, spec: tl.constexpr, rows: tl.constexpr, tokens: tl.constexpr
):
    """`partial` (B, splits, rows, d), normalised, and `log_sum` (B, splits, rows) of each row."""
    P: tl.constexpr = spec.pseudo_heads
    Pq: tl.constexpr = spec.pseudo_queries
    H: tl.constexpr = spec.heads
    G: tl.constexpr = spec.kv_heads
    columns: tl.constexpr = spec.columns
    dtype: tl.constexpr = x.query.pointer.dtype.element_ty
    split, splits = tl.program_id(0), tl.num_programs(0)
    b, N = tl.program_id(2), x.N
    S, offset = extent(x, b, spec)
    start, stop = token_range(x, split, splits, S, offset, tokens, spec)

    r = tl.program_id(1) * rows + tl.arange(0, rows)
    count = H * Pq * P * N
    exists = r < count
    n = r % N
    q = (r // N) % P
    c = tl.minimum(r // (N * P), H * Pq - 1)
    p = visibility.pseudo_index(c, Pq, spec)
    g = c // Pq // (H // G)
    j = tl.arange(0, columns)
    first, second = tiles.dimensions(j, 0, spec), tiles.dimensions(j, 1, spec)
    inside = (j < spec.half)[None, :]

    h1 = tl.zeros((rows, columns), tl.float32)
    h2 = tl.zeros((rows, columns), tl.float32)
    for m in range(H):
        weight = tl.load(x.alpha_q + m * (H * Pq) + c).to(tl.float32)[:, None]
        q1, q2 = head_tokens(x.query, b, m, n, exists, spec)
        h1 += weight * q1
        h2 += weight * q2
    if spec.rotated > 0:
        co, si = phase_of(x.cos, p, 1, spec), phase_of(x.sin, p, 1, spec)
        h1, h2 = h1 * co - h2 * si, h2 * co + h1 * si
        co, si = phase_of(x.cos, q, 1, spec), phase_of(x.sin, q, -1, spec)
        h1, h2 = h1 * co - h2 * si, h2 * co + h1 * si

    position = visibility.position(n + offset, p, spec)
    top = tl.full((rows,), -float("inf"), tl.float32)
    total = tl.zeros((rows,), tl.float32)
    o1 = tl.zeros((rows, columns), tl.float32)
    o2 = tl.zeros((rows, columns), tl.float32)
    for s0 in range(start, stop, tokens):
        s = s0 + tl.arange(0, tokens)
        cached = s < stop
        score = tl.zeros((rows, tokens), tl.float32)
        for m in range(G):
            weight = tl.load(x.alpha_k + m * (G * P) + g * P + q).to(tl.float32)[:, None]
            k1, k2 = cached_tokens(x, x.key, b, m, s, cached, spec)
            a1, a2 = (h1 * weight).to(dtype), (h2 * weight).to(dtype)
            score = tl.dot(a1, tl.trans(k1), score, input_precision=spec.precision)
            score = tl.dot(a2, tl.trans(k2), score, input_precision=spec.precision)
        score, _ = tiles.capped(x, score, spec)
        j_key = tl.where(cached[None, :], visibility.position(s[None, :], q[:, None], spec), -1)
        seen = exists[:, None] & visibility.within_limits(position[:, None], j_key, spec)
        seen = visibility.token_limits(
            x, b, c // Pq, n, s, offset, exists, cached, seen, False, spec
        )
        score = tl.where(seen, score, -float("inf"))
        weights, shrink, top, total = tiles.softmax_step(score, top, total)
        o1 = o1 * shrink[:, None]
        o2 = o2 * shrink[:, None]
        for m in range(G):
            weight = tl.load(x.alpha_v + m * (G * P) + g * P + q).to(tl.float32)[:, None]
            v1, v2 = cached_tokens(x, x.value, b, m, s, cached, spec)
            w = (weights * weight).to(dtype)
            o1 = tl.dot(w, v1, o1, input_precision=spec.precision)
            o2 = tl.dot(w, v2, o2, input_precision=spec.precision)

    sees = total > 0
    total = tl.where(sees, total, 1.0)
    line = (b * splits + split).to(tl.int64) * count + r
    tl.store(log_sum + line, tl.where(sees, top + tl.log2(total), -float("inf")), mask=exists)
    place = partial + line[:, None] * spec.width
    written = exists[:, None] & inside
    tl.store(place + first[None, :], o1 / total[:, None], mask=written)
    tl.store(place + second[None, :], o2 / total[:, None], mask=written)


@triton.jit
def merge_kernel(
    partial,
    log_sum,
    pseudo,
    N,
    splits,
    spec: tl.constexpr,
    entries: tl.constexpr,
    width: tl.constexpr,
):
    """Õ (B, H·Pq, N, d) from the rows (split, q) of each pseudo-query and token."""
    P: tl.constexpr = spec.pseudo_heads
    columns: tl.constexpr = spec.heads * spec.pseudo_queries
    c, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = columns * P * N
    j = tl.arange(0, width)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    result = tl.zeros((width,), tl.float32)
    for first in range(0, splits * P, entries):
        entry = first + tl.arange(0, entries)
        exists = entry < splits * P
        line = (b * splits + entry // P).to(tl.int64) * count + (c * P + entry % P) * N + n
        known = tl.load(log_sum + line, mask=exists, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(known, 0))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.exp2(known - base)
        shrink = tl.exp2(top - base)
        rows = tl.load(
            partial + line[:, None] * spec.width + j[None, :],
            mask=exists[:, None] & (j < spec.width)[None, :],
            other=0.0,
        )
        result = result * shrink + tl.sum(weight[:, None] * rows, 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new_top
    result = result / tl.where(total > 0, total, 1.0)
    place = pseudo + ((b * columns + c).to(tl.int64) * N + n) * spec.width
    tl.store(place + j, result.to(pseudo.dtype.element_ty), mask=j < spec.width)
