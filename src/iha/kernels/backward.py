"""The backward kernels. Each computes the attention weights again, from the saved log-sums.

The first two own query tokens, for the gradients of R, then of α^Q and the base queries; the last
two key tokens, for those of α^V and the base values, and of α^K and the base keys. One that did
more would hold more than a multiprocessor's registers.

Each program adds up its own share of a mixing tensor's gradient, and the shares are summed in a
fixed order afterwards. There are no atomic operations: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iha.kernels import tiles, visibility


@triton.jit
def backward_output_kernel(x, gradient, log_sum, delta, shares, spec: tl.constexpr):
    """Õ once more, for the gradient of R and for `delta` (B, H·Pq, N), Σ_d dÕ·Õ."""
    side: tl.constexpr = spec.queries
    size: tl.constexpr = spec.queries.size
    columns: tl.constexpr = spec.columns
    dtype: tl.constexpr = x.query.pointer.dtype.element_ty
    offset = visibility.query_offset(x, spec)
    program = tl.program_id(0)
    shares += program.to(tl.int64) * (side.heads * side.columns)
    a_sequence = tl.cdiv(x.N, side.tokens)
    for tile in range(program, x.B * a_sequence, tl.num_programs(0)):
        b = tile // a_sequence
        n0 = (tile % a_sequence) * side.tokens
        low, high = visibility.key_range(x, n0, offset, spec)
        for g in range(spec.kv_heads):
            for block in range(side.blocks):
                q1, q2 = tiles.pseudo_queries(x, b, g, block, n0, spec)
                place, inside = tiles.rows_of(log_sum, x, b, g, block, n0, spec)
                known = tl.load(place, mask=inside, other=float("inf"))
                o1 = tl.zeros((size, columns), tl.float32)
                o2 = tl.zeros((size, columns), tl.float32)
                for s0 in range(low, high, spec.key_tile.tokens):
                    for key_block in range(spec.keys.blocks):
                        k1, k2 = tiles.pseudo_keys(x, b, g, key_block, s0, spec)
                        score, _ = tiles.scores(x, q1, q2, k1, k2, spec)
                        weight = tiles.weights(
                            x, score, known, b, g, block, n0, key_block, s0, offset, False, spec
                        ).to(dtype)
                        v1, v2 = tiles.pseudo_values(x, b, g, key_block, s0, spec)
                        o1 = tl.dot(weight, v1, o1, input_precision=spec.precision)
                        o2 = tl.dot(weight, v2, o2, input_precision=spec.precision)
                tiles.gram_into(shares, gradient, o1, o2, b, g, block, n0, x.N, side, spec)
                g1, g2 = tiles.pseudo_gradients(x, gradient, b, g, block, n0, spec)
                dot = tl.sum(g1.to(tl.float32) * o1 + g2.to(tl.float32) * o2, 1)
                place, inside = tiles.rows_of(delta, x, b, g, block, n0, spec)
                tl.store(place, dot, mask=inside)


@triton.jit
def backward_query_kernel(x, gradient, log_sum, delta, result, shares, scratch, spec: tl.constexpr):
    """dQ̃ = Σ_s dS·K̃, for the gradients of the base queries and of α^Q."""
    side: tl.constexpr = spec.queries
    size: tl.constexpr = spec.queries.size
    columns: tl.constexpr = spec.columns
    dtype: tl.constexpr = x.query.pointer.dtype.element_ty
    offset = visibility.query_offset(x, spec)
    program = tl.program_id(0)
    scratch += program.to(tl.int64) * (side.heads * 2 * side.tokens * columns)
    shares += program.to(tl.int64) * (side.heads * side.columns)
    a_sequence = tl.cdiv(x.N, side.tokens)
    for tile in range(program, x.B * a_sequence, tl.num_programs(0)):
        b = tile // a_sequence
        n0 = (tile % a_sequence) * side.tokens
        low, high = visibility.key_range(x, n0, offset, spec)
        for g in range(spec.kv_heads):
            for block in range(side.blocks):
                q1, q2 = tiles.pseudo_queries(x, b, g, block, n0, spec)
                place, inside = tiles.rows_of(log_sum, x, b, g, block, n0, spec)
                known = tl.load(place, mask=inside, other=float("inf"))
                place, inside = tiles.rows_of(delta, x, b, g, block, n0, spec)
                dot = tl.load(place, mask=inside, other=0.0)
                g1, g2 = tiles.pseudo_gradients(x, gradient, b, g, block, n0, spec)
                d1 = tl.zeros((size, columns), tl.float32)
                d2 = tl.zeros((size, columns), tl.float32)
                for s0 in range(low, high, spec.key_tile.tokens):
                    for key_block in range(spec.keys.blocks):
                        k1, k2 = tiles.pseudo_keys(x, b, g, key_block, s0, spec)
                        score, slope = tiles.scores(x, q1, q2, k1, k2, spec)
                        weight = tiles.weights(
                            x, score, known, b, g, block, n0, key_block, s0, offset, False, spec
                        )
                        v1, v2 = tiles.pseudo_values(x, b, g, key_block, s0, spec)
                        change = tl.dot(g1, tl.trans(v1), input_precision=spec.precision)
                        change = tl.dot(g2, tl.trans(v2), change, input_precision=spec.precision)
                        change = weight * (change - dot[:, None]) * slope * x.scale
                        change = change.to(dtype)
                        d1 = tl.dot(change, k1, d1, input_precision=spec.precision)
                        d2 = tl.dot(change, k2, d2, input_precision=spec.precision)
                # Without it the compiler would keep the phase tables in registers all along.
                tl.debug_barrier()
                d1, d2 = tiles.rotated(x, d1, d2, block, -1, side, spec)
                tiles.gram_into(shares, x.query, d1, d2, b, g, block, n0, x.N, side, spec)
                tiles.collapse_into(
                    result, scratch, x.alpha_q, d1, d2, b, g, block, n0, x.N, side, spec
                )


@triton.jit
def backward_value_kernel(x, gradient, log_sum, result, shares, scratch, spec: tl.constexpr):
    """dṼ = Σ_n w·dÕ, for the gradients of the base values and of α^V."""
    side: tl.constexpr = spec.keys
    size: tl.constexpr = spec.keys.size
    columns: tl.constexpr = spec.columns
    dtype: tl.constexpr = x.query.pointer.dtype.element_ty
    offset = visibility.query_offset(x, spec)
    program = tl.program_id(0)
    scratch += program.to(tl.int64) * (side.heads * 2 * side.tokens * columns)
    shares += program.to(tl.int64) * (side.heads * side.columns)
    a_sequence = tl.cdiv(x.S, side.tokens)
    for tile in range(program, x.B * a_sequence, tl.num_programs(0)):
        b = tile // a_sequence
        s0 = (tile % a_sequence) * side.tokens
        low, high = visibility.query_range(x, s0, offset, spec)
        for g in range(spec.kv_heads):
            for block in range(side.blocks):
                k1, k2 = tiles.pseudo_keys(x, b, g, block, s0, spec)
                d1 = tl.zeros((size, columns), tl.float32)
                d2 = tl.zeros((size, columns), tl.float32)
                for n0 in range(low, high, spec.query_tile.tokens):
                    for query_block in range(spec.queries.blocks):
                        q1, q2 = tiles.pseudo_queries(x, b, g, query_block, n0, spec)
                        place, inside = tiles.rows_of(log_sum, x, b, g, query_block, n0, spec)
                        known = tl.load(place, mask=inside, other=float("inf"))
                        # Keys down, so that no weights need transposing.
                        score, _ = tiles.scores(x, k1, k2, q1, q2, spec)
                        weight = tiles.weights(
                            x, score, known, b, g, query_block, n0, block, s0, offset, True, spec
                        )
                        g1, g2 = tiles.pseudo_gradients(x, gradient, b, g, query_block, n0, spec)
                        weight = weight.to(dtype)
                        d1 = tl.dot(weight, g1, d1, input_precision=spec.precision)
                        d2 = tl.dot(weight, g2, d2, input_precision=spec.precision)
                tiles.gram_into(shares, x.value, d1, d2, b, g, block, s0, x.S, side, spec)
                tiles.collapse_into(
                    result, scratch, x.alpha_v, d1, d2, b, g, block, s0, x.S, side, spec
                )


@triton.jit
def backward_key_kernel(x, gradient, log_sum, delta, result, shares, scratch, spec: tl.constexpr):
    """dK̃ = Σ_n dS·Q̃, for the gradients of the base keys and of α^K."""
    side: tl.constexpr = spec.keys
    size: tl.constexpr = spec.keys.size
    columns: tl.constexpr = spec.columns
    dtype: tl.constexpr = x.query.pointer.dtype.element_ty
    offset = visibility.query_offset(x, spec)
    program = tl.program_id(0)
    scratch += program.to(tl.int64) * (side.heads * 2 * side.tokens * columns)
    shares += program.to(tl.int64) * (side.heads * side.columns)
    a_sequence = tl.cdiv(x.S, side.tokens)
    for tile in range(program, x.B * a_sequence, tl.num_programs(0)):
        b = tile // a_sequence
        s0 = (tile % a_sequence) * side.tokens
        low, high = visibility.query_range(x, s0, offset, spec)
        for g in range(spec.kv_heads):
            for block in range(side.blocks):
                k1, k2 = tiles.pseudo_keys(x, b, g, block, s0, spec)
                v1, v2 = tiles.pseudo_values(x, b, g, block, s0, spec)
                d1 = tl.zeros((size, columns), tl.float32)
                d2 = tl.zeros((size, columns), tl.float32)
                for n0 in range(low, high, spec.query_tile.tokens):
                    for query_block in range(spec.queries.blocks):
                        q1, q2 = tiles.pseudo_queries(x, b, g, query_block, n0, spec)
                        place, inside = tiles.rows_of(log_sum, x, b, g, query_block, n0, spec)
                        known = tl.load(place, mask=inside, other=float("inf"))
                        # Keys down, so that no weights need transposing.
                        score, slope = tiles.scores(x, k1, k2, q1, q2, spec)
                        weight = tiles.weights(
                            x, score, known, b, g, query_block, n0, block, s0, offset, True, spec
                        )
                        g1, g2 = tiles.pseudo_gradients(x, gradient, b, g, query_block, n0, spec)
                        change = tl.dot(v1, tl.trans(g1), input_precision=spec.precision)
                        change = tl.dot(v2, tl.trans(g2), change, input_precision=spec.precision)
                        place, inside = tiles.rows_of(delta, x, b, g, query_block, n0, spec)
                        dot = tl.load(place, mask=inside, other=0.0)
                        change = weight * (change - dot[None, :]) * slope * x.scale
                        change = change.to(dtype)
                        d1 = tl.dot(change, q1, d1, input_precision=spec.precision)
                        d2 = tl.dot(change, q2, d2, input_precision=spec.precision)
                # Without it the compiler would keep the phase tables in registers all along.
                tl.debug_barrier()
                d1, d2 = tiles.rotated(x, d1, d2, block, -1, side, spec)
                tiles.gram_into(shares, x.key, d1, d2, b, g, block, s0, x.S, side, spec)
                tiles.collapse_into(
                    result, scratch, x.alpha_k, d1, d2, b, g, block, s0, x.S, side, spec
                )
