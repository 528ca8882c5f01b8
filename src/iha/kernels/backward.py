"""The backward kernels. Each computes the attention weights again, from the saved log-sums.

`backward_output_kernel` and `backward_query_kernel` own query tokens: gradients of R, then of the
base queries and α^Q. `backward_key_kernel` owns key tokens: of base keys and values, α^K and α^V.
Each program adds up its own share of a mixing tensor's gradient, and the shares are summed in a
fixed order afterwards. There are no atomic operations: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iha.kernels import tiles
from iha.kernels.forward import rows_of


@triton.jit
def backward_output_kernel(
    query,
    key,
    value,
    alpha_q,
    alpha_k,
    alpha_v,
    collapse,
    cos,
    sin,
    limits,
    gradient,
    log_sum,
    delta,
    collapse_shares,
    B,
    N,
    S,
    scale,
    spec: tl.constexpr,
):
    """Õ once more, for the gradient of R and for `delta` (B, H·P, N), Σ_d dÕ·Õ."""
    side: tl.constexpr = spec.queries
    size: tl.constexpr = spec.queries.size
    columns: tl.constexpr = spec.columns
    dtype: tl.constexpr = query.pointer.dtype.element_ty
    offset = tiles.query_offset(limits, spec)
    program = tl.program_id(0)
    collapse_shares += program.to(tl.int64) * (side.heads * side.columns)
    a_sequence = tl.cdiv(N, side.tokens)
    for tile in range(program, B * a_sequence, tl.num_programs(0)):
        b = tile // a_sequence
        n0 = (tile % a_sequence) * side.tokens
        low, high = tiles.key_range(n0, N, S, offset, side.tokens, spec)
        for g in range(spec.kv_heads):
            for block in range(side.blocks):
                q1, q2 = tiles.turned_pseudo_rows(
                    query, alpha_q, cos, sin, b, g, block, n0, N, side, spec
                )
                place, inside = rows_of(log_sum, b, g, block, n0, N, side)
                known = tl.load(place, mask=inside, other=float("inf"))
                o1 = tl.zeros((size, columns), tl.float32)
                o2 = tl.zeros((size, columns), tl.float32)
                for s0 in range(low, high, spec.key_tile.tokens):
                    for key_block in range(spec.keys.blocks):
                        k1, k2 = tiles.turned_pseudo_rows(
                            key, alpha_k, cos, sin, b, g, key_block, s0, S, spec.keys, spec
                        )
                        score, _ = tiles.scores(q1, q2, k1, k2, scale, spec)
                        seen = tiles.visible(
                            limits, b, g, block, n0, key_block, s0, N, S, offset, False, spec
                        )
                        score = tl.where(seen, score - known[:, None], -float("inf"))
                        weight = tl.exp2(score).to(dtype)
                        v1, v2 = tiles.pseudo_rows(
                            value, alpha_v, b, g, key_block, s0, S, spec.keys, spec
                        )
                        o1 = tl.dot(weight, v1, o1, input_precision=spec.precision)
                        o2 = tl.dot(weight, v2, o2, input_precision=spec.precision)
                tiles.gram_into(collapse_shares, gradient, o1, o2, b, g, block, n0, N, side, spec)
                g1, g2 = tiles.pseudo_rows(gradient, collapse, b, g, block, n0, N, side, spec)
                dot = tl.sum(g1.to(tl.float32) * o1 + g2.to(tl.float32) * o2, 1)
                place, inside = rows_of(delta, b, g, block, n0, N, side)
                tl.store(place, dot, mask=inside)


@triton.jit
def backward_query_kernel(
    query,
    key,
    value,
    alpha_q,
    alpha_k,
    alpha_v,
    collapse,
    cos,
    sin,
    limits,
    gradient,
    log_sum,
    delta,
    query_gradient,
    alpha_q_shares,
    scratch,
    B,
    N,
    S,
    scale,
    spec: tl.constexpr,
):
    side: tl.constexpr = spec.queries
    size: tl.constexpr = spec.queries.size
    columns: tl.constexpr = spec.columns
    dtype: tl.constexpr = query.pointer.dtype.element_ty
    offset = tiles.query_offset(limits, spec)
    program = tl.program_id(0)
    scratch += program.to(tl.int64) * (side.heads * 2 * side.tokens * columns)
    alpha_q_shares += program.to(tl.int64) * (side.heads * side.columns)
    a_sequence = tl.cdiv(N, side.tokens)
    for tile in range(program, B * a_sequence, tl.num_programs(0)):
        b = tile // a_sequence
        n0 = (tile % a_sequence) * side.tokens
        low, high = tiles.key_range(n0, N, S, offset, side.tokens, spec)
        for g in range(spec.kv_heads):
            for block in range(side.blocks):
                q1, q2 = tiles.turned_pseudo_rows(
                    query, alpha_q, cos, sin, b, g, block, n0, N, side, spec
                )
                place, inside = rows_of(log_sum, b, g, block, n0, N, side)
                known = tl.load(place, mask=inside, other=float("inf"))
                place, inside = rows_of(delta, b, g, block, n0, N, side)
                dot = tl.load(place, mask=inside, other=0.0)
                g1, g2 = tiles.pseudo_rows(gradient, collapse, b, g, block, n0, N, side, spec)
                d1 = tl.zeros((size, columns), tl.float32)
                d2 = tl.zeros((size, columns), tl.float32)
                for s0 in range(low, high, spec.key_tile.tokens):
                    for key_block in range(spec.keys.blocks):
                        k1, k2 = tiles.turned_pseudo_rows(
                            key, alpha_k, cos, sin, b, g, key_block, s0, S, spec.keys, spec
                        )
                        score, slope = tiles.scores(q1, q2, k1, k2, scale, spec)
                        seen = tiles.visible(
                            limits, b, g, block, n0, key_block, s0, N, S, offset, False, spec
                        )
                        score = tl.where(seen, score - known[:, None], -float("inf"))
                        weight = tl.exp2(score)
                        v1, v2 = tiles.pseudo_rows(
                            value, alpha_v, b, g, key_block, s0, S, spec.keys, spec
                        )
                        change = tl.dot(g1, tl.trans(v1), input_precision=spec.precision)
                        change = tl.dot(g2, tl.trans(v2), change, input_precision=spec.precision)
                        change = weight * (change - dot[:, None]) * slope * scale
                        change = change.to(dtype)
                        d1 = tl.dot(change, k1, d1, input_precision=spec.precision)
                        d2 = tl.dot(change, k2, d2, input_precision=spec.precision)
                # Without it the compiler would keep the phase tables in registers all along.
                tl.debug_barrier()
                d1, d2 = tiles.turned(d1, d2, cos, sin, block, -1, side, spec)
                tiles.gram_into(alpha_q_shares, query, d1, d2, b, g, block, n0, N, side, spec)
                tiles.collapse_into(
                    query_gradient, scratch, alpha_q, d1, d2, b, g, block, n0, N, side, spec
                )


@triton.jit
def backward_value_kernel(
    query,
    key,
    value,
    alpha_q,
    alpha_k,
    alpha_v,
    collapse,
    cos,
    sin,
    limits,
    gradient,
    log_sum,
    delta,
    value_gradient,
    alpha_v_shares,
    scratch,
    B,
    N,
    S,
    scale,
    spec: tl.constexpr,
):
    side: tl.constexpr = spec.keys
    size: tl.constexpr = spec.keys.size
    columns: tl.constexpr = spec.columns
    dtype: tl.constexpr = query.pointer.dtype.element_ty
    offset = tiles.query_offset(limits, spec)
    program = tl.program_id(0)
    scratch += program.to(tl.int64) * (side.heads * 2 * side.tokens * columns)
    alpha_v_shares += program.to(tl.int64) * (side.heads * side.columns)
    a_sequence = tl.cdiv(S, side.tokens)
    for tile in range(program, B * a_sequence, tl.num_programs(0)):
        b = tile // a_sequence
        s0 = (tile % a_sequence) * side.tokens
        low, high = tiles.query_range(s0, N, S, offset, side.tokens, spec)
        for g in range(spec.kv_heads):
            for block in range(side.blocks):
                k1, k2 = tiles.turned_pseudo_rows(
                    key, alpha_k, cos, sin, b, g, block, s0, S, side, spec
                )
                d1 = tl.zeros((size, columns), tl.float32)
                d2 = tl.zeros((size, columns), tl.float32)
                for n0 in range(low, high, spec.query_tile.tokens):
                    for query_block in range(spec.queries.blocks):
                        q1, q2 = tiles.turned_pseudo_rows(
                            query, alpha_q, cos, sin, b, g, query_block, n0, N, spec.queries, spec
                        )
                        place, inside = rows_of(log_sum, b, g, query_block, n0, N, spec.queries)
                        known = tl.load(place, mask=inside, other=float("inf"))
                        # Keys down, so that no weights need transposing.
                        score, _ = tiles.scores(k1, k2, q1, q2, scale, spec)
                        seen = tiles.visible(
                            limits, b, g, query_block, n0, block, s0, N, S, offset, True, spec
                        )
                        score = tl.where(seen, score - known[None, :], -float("inf"))
                        weight = tl.exp2(score)
                        g1, g2 = tiles.pseudo_rows(
                            gradient, collapse, b, g, query_block, n0, N, spec.queries, spec
                        )
                        weight = weight.to(dtype)
                        d1 = tl.dot(weight, g1, d1, input_precision=spec.precision)
                        d2 = tl.dot(weight, g2, d2, input_precision=spec.precision)
                tiles.gram_into(alpha_v_shares, value, d1, d2, b, g, block, s0, S, side, spec)
                tiles.collapse_into(
                    value_gradient, scratch, alpha_v, d1, d2, b, g, block, s0, S, side, spec
                )


@triton.jit
def backward_key_kernel(
    query,
    key,
    value,
    alpha_q,
    alpha_k,
    alpha_v,
    collapse,
    cos,
    sin,
    limits,
    gradient,
    log_sum,
    delta,
    key_gradient,
    alpha_k_shares,
    scratch,
    B,
    N,
    S,
    scale,
    spec: tl.constexpr,
):
    side: tl.constexpr = spec.keys
    size: tl.constexpr = spec.keys.size
    columns: tl.constexpr = spec.columns
    dtype: tl.constexpr = query.pointer.dtype.element_ty
    offset = tiles.query_offset(limits, spec)
    program = tl.program_id(0)
    scratch += program.to(tl.int64) * (side.heads * 2 * side.tokens * columns)
    alpha_k_shares += program.to(tl.int64) * (side.heads * side.columns)
    a_sequence = tl.cdiv(S, side.tokens)
    for tile in range(program, B * a_sequence, tl.num_programs(0)):
        b = tile // a_sequence
        s0 = (tile % a_sequence) * side.tokens
        low, high = tiles.query_range(s0, N, S, offset, side.tokens, spec)
        for g in range(spec.kv_heads):
            for block in range(side.blocks):
                k1, k2 = tiles.turned_pseudo_rows(
                    key, alpha_k, cos, sin, b, g, block, s0, S, side, spec
                )
                v1, v2 = tiles.pseudo_rows(value, alpha_v, b, g, block, s0, S, side, spec)
                d1 = tl.zeros((size, columns), tl.float32)
                d2 = tl.zeros((size, columns), tl.float32)
                for n0 in range(low, high, spec.query_tile.tokens):
                    for query_block in range(spec.queries.blocks):
                        q1, q2 = tiles.turned_pseudo_rows(
                            query, alpha_q, cos, sin, b, g, query_block, n0, N, spec.queries, spec
                        )
                        place, inside = rows_of(log_sum, b, g, query_block, n0, N, spec.queries)
                        known = tl.load(place, mask=inside, other=float("inf"))
                        # Keys down, so that no weights need transposing.
                        score, slope = tiles.scores(k1, k2, q1, q2, scale, spec)
                        seen = tiles.visible(
                            limits, b, g, query_block, n0, block, s0, N, S, offset, True, spec
                        )
                        score = tl.where(seen, score - known[None, :], -float("inf"))
                        weight = tl.exp2(score)
                        g1, g2 = tiles.pseudo_rows(
                            gradient, collapse, b, g, query_block, n0, N, spec.queries, spec
                        )
                        change = tl.dot(v1, tl.trans(g1), input_precision=spec.precision)
                        change = tl.dot(v2, tl.trans(g2), change, input_precision=spec.precision)
                        place, inside = rows_of(delta, b, g, query_block, n0, N, spec.queries)
                        dot = tl.load(place, mask=inside, other=0.0)
                        change = weight * (change - dot[None, :]) * slope * scale
                        change = change.to(dtype)
                        d1 = tl.dot(change, q1, d1, input_precision=spec.precision)
                        d2 = tl.dot(change, q2, d2, input_precision=spec.precision)
                # Without it the compiler would keep the phase tables in registers all along.
                tl.debug_barrier()
                d1, d2 = tiles.turned(d1, d2, cos, sin, block, -1, side, spec)
                tiles.gram_into(alpha_k_shares, key, d1, d2, b, g, block, s0, S, side, spec)
                tiles.collapse_into(
                    key_gradient, scratch, alpha_k, d1, d2, b, g, block, s0, S, side, spec
                )
