"""Who sees whom: ranges of tokens that a tile needs, and the mask within a pair of tiles.

The same rules as `visible_pairs` and `token_mask` of `iha.visibility`, by index arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def query_offset(x, spec: tl.constexpr):
    if spec.offset_read:
        return tl.load(x.offset).to(tl.int32)
    else:  # written out: Triton wants one type of what follows a return
        return x.offset


@triton.jit
def key_range(x, n0, offset, spec: tl.constexpr):
    """The key tokens that a tile of query tokens may see, by position."""
    low, high = 0, x.S
    last = tl.minimum(n0 + spec.query_tile.tokens, x.N) - 1 + offset
    if spec.window is not None:
        # Under flat causality the token a window back is still seen in part.
        low = tl.maximum(low, n0 + offset - spec.window)
    if spec.causal is not None:
        high = tl.minimum(high, last + 1)
    elif spec.window is not None:
        high = tl.minimum(high, last + spec.window)
    return low, high


@triton.jit
def query_range(x, s0, offset, spec: tl.constexpr):
    """The query tokens that may see a tile of key tokens, by position."""
    low, high = 0, x.N
    last = tl.minimum(s0 + spec.key_tile.tokens, x.S) - 1 - offset
    if spec.causal is not None:
        low = tl.maximum(low, s0 - offset)
    elif spec.window is not None:
        low = tl.maximum(low, s0 - offset - spec.window + 1)
    if spec.window is not None:
        high = tl.minimum(high, last + spec.window + 1)
    return low, high


@triton.jit
def pseudo_index(c, indices: tl.constexpr, spec: tl.constexpr):
    """Which p of 0 … P-1 column c is, of as many as its side has: the last ones."""
    return c % indices + (spec.pseudo_heads - indices)


@triton.jit
def position(token, p, spec: tl.constexpr):
    """What visibility compares: under flat causality virtual tokens, otherwise tokens."""
    if spec.causal == "flat":
        return token * spec.pseudo_heads + p
    else:  # written out: Triton wants one type of what follows a return
        return token


@triton.jit
def within_limits(i, j, spec: tl.constexpr):
    """Whether a query at position i sees a key at position j (`iha.visibility.visible_pairs`)."""
    seen = j >= 0
    if spec.causal is not None:
        seen = seen & (i >= j)
    if spec.window is not None:
        seen = seen & (i - j < spec.reach)
        if spec.causal is None:
            seen = seen & (j - i < spec.reach)
    return seen


@triton.jit
def across(of_query, of_key, keys_first: tl.constexpr):
    """Two vectors as a column and a row, queries down and keys to the right or the other way."""
    if keys_first:
        return of_query[None, :], of_key[:, None]
    else:  # written out: Triton wants one type of what follows a return
        return of_query[:, None], of_key[None, :]


@triton.jit
def token_limits(
    x,
    b,
    h,
    n,
    s,
    offset,
    row_exists,
    column_exists,
    seen,
    keys_first: tl.constexpr,
    spec: tl.constexpr,
):
    """`seen`, less what the mask and the documents hide (`iha.visibility.token_mask`)."""
    if spec.masked:
        of_row = h.to(tl.int64) * x.mask_head + n.to(tl.int64) * x.mask_query
        of_row += b.to(tl.int64) * x.mask_batch
        of_row, of_column = across(of_row, s.to(tl.int64) * x.mask_key, keys_first)
        seen = seen & (tl.load(x.mask + of_row + of_column, mask=seen, other=0) != 0)
    if spec.documents:
        ids = x.documents + b.to(tl.int64) * x.S
        of_query = tl.load(ids + n + offset, mask=row_exists & (n + offset < x.S), other=0)
        of_key = tl.load(ids + s, mask=column_exists, other=0)
        of_query, of_key = across(of_query, of_key, keys_first)
        seen = seen & (of_query == of_key)
    return seen


@triton.jit
def visible(
    x,
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
    """Which pseudo-queries of a tile see which pseudo-keys of another."""
    row = tl.arange(0, spec.queries.size)
    column = tl.arange(0, spec.keys.size)
    n = n0 + row % spec.query_tile.tokens
    s = s0 + column % spec.key_tile.tokens
    place = query_block * spec.query_tile.rows + row // spec.query_tile.tokens
    q = key_block * spec.key_tile.rows + column // spec.key_tile.tokens
    row_exists = (place < spec.queries.shared) & (n < x.N)
    column_exists = (q < spec.pseudo_heads) & (s < x.S)
    p = pseudo_index(place, spec.pseudo_queries, spec)
    i = position(n + offset, p, spec)
    # A key that does not exist stands where `within_limits` hides it.
    j = tl.where(column_exists, position(s, q, spec), -1)
    i, j = across(i, j, keys_first)
    exists, _ = across(row_exists, column_exists, keys_first)
    seen = exists & within_limits(i, j, spec)
    h = g * (spec.heads // spec.kv_heads) + place // spec.pseudo_queries
    return token_limits(x, b, h, n, s, offset, row_exists, column_exists, seen, keys_first, spec)
