"""What every kernel does with one tile: mix heads into it, rotate it, score it, collapse it.

A tile is kept *pseudo-major*, row r·tokens + t, because then mixing is one small matrix product,
(pseudo-heads x heads)·(heads x tokens·d), whose result already is the tile; a softmax does not care
about the order of its keys. It comes as two halves of the head dimension, so that the two
dimensions that rotate together stand at the same place of each.

Names: `x` is the call (`Inputs`), `g` a key/value head, `block` the tile among those of its
pseudo-heads (`Side.blocks`), `first` the tile's first token, `count` the tokens that exist.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iha.kernels import visibility

# Base heads that one matrix product mixes: the least that tensor cores take.
HEAD_BLOCK = tl.constexpr(16)


@triton.jit
def pseudo_heads(g, block, side: tl.constexpr):
    """The columns c of the mixing tensor that a tile takes, and which of them exist."""
    place = block * side.rows + tl.arange(0, side.rows)
    return g * side.shared + place, place < side.shared


@triton.jit
def dimensions(j, part: tl.constexpr, spec: tl.constexpr):
    """Where in 0 … d-1 column j of the first or second half (`part` 0 or 1) of a tile lies."""
    if spec.pairs:
        return 2 * j + part
    if spec.rotated == 0 or spec.rotated == spec.half:
        # Contiguous, which lets the compiler load many at a time.
        return j + part * spec.half
    rest: tl.constexpr = spec.half - spec.rotated
    return tl.where(j < spec.rotated, j + part * spec.rotated, spec.rotated + j + part * rest)


@triton.jit
def cells(base, first, count, part: tl.constexpr, side: tl.constexpr, spec: tl.constexpr):
    """Offsets of tokens x half the dimensions within one base head, and which of them exist."""
    cell = tl.arange(0, side.tokens * spec.columns)
    token = first + cell // spec.columns
    j = cell % spec.columns
    inside = token < count
    if spec.columns > spec.half:
        inside = inside & (j < spec.half)
    return token.to(tl.int64) * base.token + dimensions(j, part, spec), inside


@triton.jit
def base_heads(base, b, m, offset, inside, side: tl.constexpr):
    """Base heads m at offsets from `cells`."""
    return tl.load(
        base.pointer + b.to(tl.int64) * base.batch + m[:, None] * base.head + offset[None, :],
        mask=(m < side.heads)[:, None] & inside[None, :],
        other=0.0,
    )


@triton.jit
def mixed_half(
    base,
    alpha,
    b,
    g,
    block,
    first,
    count,
    part: tl.constexpr,
    side: tl.constexpr,
    spec: tl.constexpr,
):
    """Σ_m α[m,c]·X[m] in float32, for the pseudo-heads c of a tile and half of the dimensions."""
    dtype: tl.constexpr = base.pointer.dtype.element_ty
    size: tl.constexpr = side.size
    columns: tl.constexpr = spec.columns
    flat: tl.constexpr = side.tokens * columns
    rows: tl.constexpr = side.rows
    heads: tl.constexpr = side.heads
    offset, inside = cells(base, first, count, part, side, spec)
    c, exists = pseudo_heads(g, block, side)
    result = tl.zeros((rows, flat), tl.float32)
    for m0 in range(0, heads, HEAD_BLOCK):
        m = m0 + tl.arange(0, HEAD_BLOCK)
        weight = tl.load(
            alpha + m[None, :] * side.columns + c[:, None],
            mask=(m < side.heads)[None, :] & exists[:, None],
            other=0.0,
        )
        x = base_heads(base, b, m, offset, inside, side)
        result = tl.dot(weight.to(dtype), x, result, input_precision=spec.precision)
    return tl.reshape(result, (size, columns))


@triton.jit
def rotated(
    x,
    first_half,
    second_half,
    block,
    direction: tl.constexpr,
    side: tl.constexpr,
    spec: tl.constexpr,
):
    """Rotate each row by the phase of its pseudo-head (`direction` 1) or back (-1)."""
    if spec.rotated > 0:
        rows: tl.constexpr = side.rows
        size: tl.constexpr = side.size
        tokens: tl.constexpr = side.tokens
        columns: tl.constexpr = spec.columns
        p = visibility.pseudo_index(block * rows + tl.arange(0, rows), side.indices, spec)
        j = tl.arange(0, columns)
        place = p[:, None] * spec.half + j[None, :]
        inside = (j < spec.half)[None, :]
        # Broadcast over tokens rather than loaded for each: a quarter of the registers.
        c = tl.load(x.cos + place, mask=inside, other=1.0)[:, None, :]
        s = tl.load(x.sin + place, mask=inside, other=0.0)[:, None, :] * direction
        h1 = tl.reshape(first_half, (rows, tokens, columns))
        h2 = tl.reshape(second_half, (rows, tokens, columns))
        first_half = tl.reshape(h1 * c - h2 * s, (size, columns))
        second_half = tl.reshape(h2 * c + h1 * s, (size, columns))
    return first_half, second_half


@triton.jit
def mixed(base, alpha, b, g, block, first, count, side: tl.constexpr, spec: tl.constexpr):
    h1 = mixed_half(base, alpha, b, g, block, first, count, 0, side, spec)
    h2 = mixed_half(base, alpha, b, g, block, first, count, 1, side, spec)
    return h1, h2


@triton.jit
def pseudo_queries(x, b, g, block, n0, spec: tl.constexpr):
    """A tile of Q̃, rotated by its phases."""
    dtype: tl.constexpr = x.query.pointer.dtype.element_ty
    h1, h2 = mixed(x.query, x.alpha_q, b, g, block, n0, x.N, spec.queries, spec)
    h1, h2 = rotated(x, h1, h2, block, 1, spec.queries, spec)
    return h1.to(dtype), h2.to(dtype)


@triton.jit
def pseudo_keys(x, b, g, block, s0, spec: tl.constexpr):
    """A tile of K̃, rotated by its phases."""
    dtype: tl.constexpr = x.query.pointer.dtype.element_ty
    h1, h2 = mixed(x.key, x.alpha_k, b, g, block, s0, x.S, spec.keys, spec)
    h1, h2 = rotated(x, h1, h2, block, 1, spec.keys, spec)
    return h1.to(dtype), h2.to(dtype)


@triton.jit
def pseudo_values(x, b, g, block, s0, spec: tl.constexpr):
    """A tile of Ṽ."""
    dtype: tl.constexpr = x.query.pointer.dtype.element_ty
    h1, h2 = mixed(x.value, x.alpha_v, b, g, block, s0, x.S, spec.keys, spec)
    return h1.to(dtype), h2.to(dtype)


@triton.jit
def pseudo_gradients(x, gradient, b, g, block, n0, spec: tl.constexpr):
    """A tile of dÕ, which R makes of the outputs' gradients."""
    dtype: tl.constexpr = x.query.pointer.dtype.element_ty
    h1, h2 = mixed(gradient, x.collapse, b, g, block, n0, x.N, spec.queries, spec)
    return h1.to(dtype), h2.to(dtype)


@triton.jit
def rows_of(pointer, x, b, g, block, n0, spec: tl.constexpr):
    """Where a query tile's rows lie in a (B, H·Pq, N) tensor with one number a pseudo-query."""
    side: tl.constexpr = spec.queries
    row = tl.arange(0, side.size)
    n = n0 + row % side.tokens
    place = block * side.rows + row // side.tokens
    line = b.to(tl.int64) * side.columns + g * side.shared + place
    return pointer + line * x.N + n, (place < side.shared) & (n < x.N)


@triton.jit
def scores(x, q1, q2, k1, k2, spec: tl.constexpr):
    """Scores in units of log 2, after the soft-cap; and the soft-cap's slope.

    With keys before queries among the arguments, the same scores, keys down.
    """
    raw = tl.dot(q1, tl.trans(k1), input_precision=spec.precision)
    raw = tl.dot(q2, tl.trans(k2), raw, input_precision=spec.precision)
    return capped(x, raw, spec)


@triton.jit
def capped(x, products, spec: tl.constexpr):
    """Scores in units of log 2 from products of queries and keys, and the soft-cap's slope."""
    raw = products * x.scale
    slope = 1.0
    if spec.softcap is not None:
        tanh = 2.0 * tl.sigmoid(raw * (2.0 / spec.softcap)) - 1.0
        raw = spec.softcap * tanh
        slope = 1.0 - tanh * tanh
    return raw * 1.4426950408889634, slope


@triton.jit
def softmax_step(score, top, total):
    """One tile of an online softmax: its weights, and what shrinks all that came before it."""
    new_top = tl.maximum(top, tl.max(score, 1))
    # A row that has seen nothing yet has no largest score to subtract.
    base = tl.where(new_top == -float("inf"), 0.0, new_top)
    weight = tl.exp2(score - base[:, None])
    shrink = tl.exp2(top - base)
    return weight, shrink, new_top, total * shrink + tl.sum(weight, 1)


@triton.jit
def weights(
    x,
    score,
    known,
    b,
    g,
    query_block,
    n0,
    key_block,
    s0,
    offset,
    keys_first: tl.constexpr,
    spec: tl.constexpr,
):
    """The attention weights once more, from the scores and the log-sums of forward."""
    seen = visibility.visible(x, b, g, query_block, n0, key_block, s0, offset, keys_first, spec)
    known, _ = visibility.across(known, known, keys_first)
    return tl.exp2(tl.where(seen, score - known, -float("inf")))


@triton.jit
def collapse_into(
    result,
    scratch,
    weights,
    first_half,
    second_half,
    b,
    g,
    block,
    first,
    count,
    side: tl.constexpr,
    spec: tl.constexpr,
):
    """Add Σ_c w[m,c]·tile[c] to tokens first … of every base head m.

    The sum over all tiles is kept in float32 in a program's own `scratch`, (heads, 2, tokens·d/2),
    and the last tile writes it to `result`. No other program touches it, so the order is fixed.
    """
    collapse_half(result, scratch, weights, first_half, b, g, block, first, count, 0, side, spec)
    collapse_half(result, scratch, weights, second_half, b, g, block, first, count, 1, side, spec)
    # The next tile reads what other threads of this program have written.
    tl.debug_barrier()


@triton.jit
def collapse_half(
    result,
    scratch,
    weights,
    half,
    b,
    g,
    block,
    first,
    count,
    part: tl.constexpr,
    side: tl.constexpr,
    spec: tl.constexpr,
):
    dtype: tl.constexpr = result.pointer.dtype.element_ty
    flat: tl.constexpr = side.tokens * spec.columns
    rows: tl.constexpr = side.rows
    heads: tl.constexpr = side.heads
    is_first = (g == 0) & (block == 0)
    is_last = (g == spec.kv_heads - 1) & (block == side.blocks - 1)
    row = tl.arange(0, rows)
    c, exists = pseudo_heads(g, block, side)
    offset, inside = cells(result, first, count, part, side, spec)
    tile = tl.reshape(half, (rows, flat))
    for m0 in range(0, heads, HEAD_BLOCK):
        m = m0 + tl.arange(0, HEAD_BLOCK)
        kept = (m < side.heads)[:, None] & tl.full((1, flat), 1, tl.int1)
        place = scratch + m[:, None] * (2 * flat) + (part * flat + tl.arange(0, flat))[None, :]
        total = tl.load(place, mask=kept & (is_first == 0), other=0.0)
        if rows >= 16:
            weight = tl.load(
                weights + m[:, None] * side.columns + c[None, :],
                mask=(m < side.heads)[:, None] & exists[None, :],
                other=0.0,
            )
            total = tl.dot(weight.to(dtype), tile.to(dtype), total, input_precision=spec.precision)
        else:
            # Too few rows for a tensor core's product.
            for r in tl.static_range(rows):
                line = tl.sum(tl.where((row == r)[:, None], tile, 0.0), 0)
                column = g * side.shared + block * rows + r
                weight = tl.load(
                    weights + m * side.columns + column,
                    mask=(m < side.heads) & (block * rows + r < side.shared),
                    other=0.0,
                )
                total += weight.to(tl.float32)[:, None] * line[None, :]
        if is_last:
            to = result.pointer + b.to(tl.int64) * result.batch + m[:, None] * result.head
            written = kept & inside[None, :]
            tl.store(to + offset[None, :], total.to(dtype), mask=written)
        else:
            tl.store(place, total, mask=kept)


@triton.jit
def gram_into(
    share,
    base,
    first_half,
    second_half,
    b,
    g,
    block,
    first,
    count,
    side: tl.constexpr,
    spec: tl.constexpr,
):
    """Add Σ_{t,j} X[m,t,j]·tile[c,t,j] to a program's own share of a mixing tensor's gradient."""
    gram_half(share, base, first_half, b, g, block, first, count, 0, side, spec)
    # Both add to the same numbers, and other threads may load them than those that store them.
    tl.debug_barrier()
    gram_half(share, base, second_half, b, g, block, first, count, 1, side, spec)
    tl.debug_barrier()


@triton.jit
def gram_half(
    share,
    base,
    half,
    b,
    g,
    block,
    first,
    count,
    part: tl.constexpr,
    side: tl.constexpr,
    spec: tl.constexpr,
):
    dtype: tl.constexpr = base.pointer.dtype.element_ty
    rows: tl.constexpr = side.rows
    heads: tl.constexpr = side.heads
    flat: tl.constexpr = side.tokens * spec.columns
    c, exists = pseudo_heads(g, block, side)
    tile = tl.reshape(half, (rows, flat))
    if rows >= 16:
        tile = tl.trans(tile.to(dtype))
    row = tl.arange(0, rows)
    offset, inside = cells(base, first, count, part, side, spec)
    for m0 in range(0, heads, HEAD_BLOCK):
        m = m0 + tl.arange(0, HEAD_BLOCK)
        exist = m < side.heads
        x = base_heads(base, b, m, offset, inside, side)
        if rows >= 16:
            place = share + m[:, None] * side.columns + c[None, :]
            kept = exist[:, None] & exists[None, :]
            total = tl.load(place, mask=kept, other=0.0)
            total = tl.dot(x, tile, total, input_precision=spec.precision)
            tl.store(place, total, mask=kept)
        else:
            # Few rows of many tokens: a tensor core's product would hold all of them in registers.
            for r in tl.static_range(rows):
                line = tl.sum(tl.where((row == r)[:, None], tile, 0.0), 0)
                place = share + m * side.columns + g * side.shared + block * rows + r
                kept = exist & (block * rows + r < side.shared)
                total = tl.load(place, mask=kept, other=0.0)
                tl.store(place, total + tl.sum(x.to(tl.float32) * line[None, :], 1), mask=kept)
