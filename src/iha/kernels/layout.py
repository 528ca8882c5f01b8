"""What a kernel is compiled for, and the tensors that it is handed."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple


def power_of_two(number: int) -> int:
    """The least one that is not below `number`."""
    return 1 << (number - 1).bit_length()


def half_columns(width: int) -> int:
    """Columns of half a tile: d/2, padded to a power of two that tensor cores take."""
    return max(16, power_of_two(width // 2))


class Heads(NamedTuple):
    """A (B, heads, tokens, d) tensor with its strides; that of d is 1."""

    pointer: Any
    batch: Any
    head: Any
    token: Any


class Inputs(NamedTuple):
    """A call. What is absent is None, or a stride that nobody reads."""

    query: Heads
    key: Heads
    value: Heads
    alpha_q: Any
    alpha_k: Any
    alpha_v: Any
    collapse: Any
    cos: Any  # (P, d/2), as sin
    sin: Any
    offset: Any  # position of the first query: a number, or a pointer to one
    mask: Any  # (B, H, N, S) with its four strides, 0 where it broadcasts
    mask_batch: Any
    mask_head: Any
    mask_query: Any
    mask_key: Any
    documents: Any  # (B, S)
    B: Any
    N: Any
    S: Any
    scale: Any
    # For keys in pages: which page holds tokens i·page … of a sequence, and how many tokens it has.
    table: Any = None  # (B, pages) with rows table_batch apart
    table_batch: Any = 0
    lengths: Any = None  # (B,)


@dataclasses.dataclass(frozen=True)
class Tile:
    """`rows` pseudo-heads of `tokens` tokens each, both powers of two.

    As a matrix it has `size` rows: row r·tokens + t is pseudo-head r of token t.
    """

    rows: int
    tokens: int

    @property
    def size(self) -> int:
        return self.rows * self.tokens


@dataclasses.dataclass(frozen=True)
class Side:
    """The query side or the key side of the operator, and its tile.

    A mixing tensor (heads, h, P) is read as a matrix: column c = h·P + p is a pseudo-head. Those
    of one key/value head are `shared` columns: P keys, or the (H/G)·Pq queries that see them. A
    tile takes `rows` of these at a time, the last one padded.
    """

    heads: int
    indices: int  # P, or Pq for queries
    shared: int
    tile: Tile

    @property
    def columns(self) -> int:
        return self.heads * self.indices

    @property
    def rows(self) -> int:
        return self.tile.rows

    @property
    def tokens(self) -> int:
        return self.tile.tokens

    @property
    def size(self) -> int:
        return self.tile.size

    @property
    def blocks(self) -> int:
        """Tiles that the columns of one key/value head need."""
        return -(-self.shared // self.tile.rows)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for: the shape, what is visible, the tiles."""

    heads: int  # H
    kv_heads: int  # G
    pseudo_heads: int  # P
    pseudo_queries: int  # Pq ≤ P: the last ones
    width: int  # d
    causal: str | None
    window: int | None
    softcap: float | None
    masked: bool
    documents: bool
    offset_read: bool  # the first query's position is read from memory
    rotated: int  # pairs of dimensions that the phase turns; 0 without a phase
    pairs: bool  # whether a pair is two neighbours, or two dimensions half a rotation apart
    precision: str  # of matrix products in float32: "ieee" or "tf32"
    query_tile: Tile
    key_tile: Tile
    page: int | None = None  # tokens of a page; None where keys are (B, G, S, d)

    @property
    def reach(self) -> int | None:
        """The window, in the unit of `position` (visibility.py)."""
        flat = self.causal == "flat"
        return self.window * self.pseudo_heads if flat and self.window else self.window

    @property
    def half(self) -> int:
        return self.width // 2

    @property
    def columns(self) -> int:
        """Of half a tile."""
        return half_columns(self.width)

    @property
    def queries(self) -> Side:
        Pq = self.pseudo_queries
        return Side(self.heads, Pq, self.heads // self.kv_heads * Pq, self.query_tile)

    @property
    def keys(self) -> Side:
        P = self.pseudo_heads
        return Side(self.kv_heads, P, P, self.key_tile)
