"""Bytes that one forward pass moves through memory besides its attention kernel's own, counted.

Per pseudo tensor of P times its base: a matrix product writes it, a phase reads and writes the
queries and keys once more, the attention reads it. The output is written, and read by the collapse.
Written pseudo-major, (B, h, P, N, d), each tensor is copied once more into the interleaved order,
and the output back; written tokens-major, (B, N, P, h, d), it *is* in that order.
"""

from __future__ import annotations


def moved(
    tokens: int,
    heads: int,
    kv_heads: int,
    width: int,
    pseudo_heads: int,
    *,
    pseudo_queries: int | None = None,
    itemsize: int = 4,
    phase: bool = True,
    copies: bool = False,
) -> int:
    """Count bytes of a layer and sequence; `copies` is the pseudo-major layout."""
    Pq = pseudo_heads if pseudo_queries is None else pseudo_queries
    query, key = tokens * heads * width, tokens * kv_heads * width
    of_queries, of_keys = Pq * query, pseudo_heads * key
    numbers = (query + 2 * key) + (of_queries + 2 * of_keys)  # products: base in, pseudo out
    numbers += 2 * (of_queries + of_keys) if phase else 0
    numbers += (of_queries + 2 * of_keys) + of_queries  # attention: in, and out
    numbers += of_queries + query  # collapse: in, and out
    numbers += 2 * (of_queries + 2 * of_keys + of_queries) if copies else 0
    return numbers * itemsize
