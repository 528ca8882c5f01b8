"""The forward kernel: base queries, keys and values in, outputs out, no pseudo tensor in memory.

A program owns some tokens of a sequence. It goes through the key/value heads, a block of
pseudo-queries at a time: mixes them, then tile by tile the pseudo-keys and -values that they see,
with the usual online softmax, and adds what the collapse makes of the result to its own output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iha.kernels import tiles, visibility


@triton.jit
def forward_kernel(x, output, log_sum, scratch, spec: tl.constexpr):
    """`log_sum` (B, H·Pq, N): log2 of each softmax's denominator, +inf where nothing is seen."""
    side: tl.constexpr = spec.queries
    size: tl.constexpr = spec.queries.size
    columns: tl.constexpr = spec.columns
    dtype: tl.constexpr = x.query.pointer.dtype.element_ty
    offset = visibility.query_offset(x, spec)
    program = tl.program_id(0)
    scratch += program.to(tl.int64) * (side.heads * 2 * side.tokens * columns)
    a_sequence = tl.cdiv(x.N, side.tokens)
    for tile in range(program, x.B * a_sequence, tl.num_programs(0)):
        b = tile // a_sequence
        n0 = (tile % a_sequence) * side.tokens
        low, high = visibility.key_range(x, n0, offset, spec)
        for g in range(spec.kv_heads):
            for block in range(side.blocks):
                q1, q2 = tiles.pseudo_queries(x, b, g, block, n0, spec)
                top = tl.full((size,), -float("inf"), tl.float32)
                total = tl.zeros((size,), tl.float32)
                o1 = tl.zeros((size, columns), tl.float32)
                o2 = tl.zeros((size, columns), tl.float32)
                for s0 in range(low, high, spec.key_tile.tokens):
                    for key_block in range(spec.keys.blocks):
                        k1, k2 = tiles.pseudo_keys(x, b, g, key_block, s0, spec)
                        score, _ = tiles.scores(x, q1, q2, k1, k2, spec)
                        seen = visibility.visible(
                            x, b, g, block, n0, key_block, s0, offset, False, spec
                        )
                        score = tl.where(seen, score, -float("inf"))
                        weight, shrink, top, total = tiles.softmax_step(score, top, total)
                        v1, v2 = tiles.pseudo_values(x, b, g, key_block, s0, spec)
                        weight = weight.to(dtype)
                        o1 = o1 * shrink[:, None]
                        o2 = o2 * shrink[:, None]
                        o1 = tl.dot(weight, v1, o1, input_precision=spec.precision)
                        o2 = tl.dot(weight, v2, o2, input_precision=spec.precision)
                sees = total > 0
                total = tl.where(sees, total, 1.0)
                o1 = o1 / total[:, None]
                o2 = o2 / total[:, None]
                place, inside = tiles.rows_of(log_sum, x, b, g, block, n0, spec)
                known = tl.where(sees, top + tl.log2(total), float("inf"))
                tl.store(place, known, mask=inside)
                tiles.collapse_into(
                    output, scratch, x.collapse, o1, o2, b, g, block, n0, x.N, side, spec
                )
