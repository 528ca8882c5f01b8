"""Tile sizes: by rule, or as tuning on a device has found them.

The rule's tiles spill no register in the paper's layers (P = 16, 20, 32 and as many heads, d = 128,
half precision), for Hopper and for Blackwell, and some elsewhere: `iha_lab.bench.kernels` compiles
them all and writes down what each takes. Of a tile's rows, as many are pseudo-heads as belong
together and the rest are tokens, since a window layer computes with T + W tokens of keys for T.

`tuned.json`, where there is one, holds what `python -m iha_lab.bench.tune` measured to be faster.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources
from typing import Any, Literal

from iha.kernels.layout import Tile, half_columns, power_of_two

Kernel = Literal["forward", "output", "query", "value", "key", "decode"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Rows of the query and of the key tile, at 64 columns of 2 bytes; loads under way at once."""

    query_rows: int
    key_rows: int
    stages: int


# By kernel and P, for Hopper; then what Blackwell has otherwise. Each is the largest of those tried
# that spills nothing, or least.
FEW: dict[Kernel, Rule] = {  # P < 16
    "forward": Rule(64, 64, stages=1),
    "output": Rule(64, 64, stages=1),
    "query": Rule(32, 64, stages=1),
    "value": Rule(64, 32, stages=1),
    "key": Rule(64, 32, stages=1),
    "decode": Rule(128, 32, stages=3),
}
RULES: dict[Kernel, Rule] = {  # P = 16
    "forward": Rule(128, 64, stages=2),
    "output": Rule(128, 64, stages=2),
    "query": Rule(128, 32, stages=1),
    "value": Rule(64, 64, stages=2),
    "key": Rule(32, 128, stages=1),
    "decode": Rule(128, 32, stages=3),
}
MANY: dict[Kernel, Rule] = {  # P > 16
    **dict.fromkeys(RULES, Rule(128, 32, stages=1)),
    "decode": RULES["decode"],
}
BLACKWELL: dict[Kernel, Rule] = {
    **RULES,
    "output": Rule(128, 64, stages=1),
    "query": Rule(64, 64, stages=2),
    "key": Rule(64, 64, stages=1),
}
BLACKWELL_MANY: dict[Kernel, Rule] = {**MANY, "query": Rule(32, 128, stages=2)}
# float32, of which a product takes far more registers
SINGLE: dict[Kernel, Rule] = dict.fromkeys(RULES, Rule(64, 32, stages=1))

# Bytes that one mixing product reads at a time at most, and what may be under way twice.
MOST_READ, MOST_DOUBLED = 32 * 1024, 16 * 1024


@dataclasses.dataclass(frozen=True)
class Config:
    """A kernel's tiles, and Triton's own two numbers."""

    query_tile: Tile
    key_tile: Tile
    warps: int = 8
    stages: int = 1


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kernel's tiles depend on: P, (H/G)·Pq, d, bytes an element, the GPU's generation."""

    pseudo_heads: int
    shared: int  # pseudo-queries of one key/value head, (H/G)·Pq
    width: int
    bytes: int
    generation: int  # 8 Ampere, 9 Hopper, 10 Blackwell

    @property
    def columns(self) -> int:
        """Of half a tile."""
        return half_columns(self.width)

    @property
    def token_bytes(self) -> int:
        """What a mixing product reads of a token: half the dimensions of 16 base heads."""
        return 16 * self.columns * self.bytes


@functools.cache
def config(kernel: Kernel, shape: Shape) -> Config:
    return tuned().get((kernel, shape)) or by_rule(shape, _rules(shape)[kernel])


def _rules(shape: Shape) -> dict[Kernel, Rule]:
    if shape.bytes == 4:
        return SINGLE
    if shape.pseudo_heads < 16:
        return FEW
    if shape.generation >= 10:
        return BLACKWELL if shape.pseudo_heads == 16 else BLACKWELL_MANY
    return RULES if shape.pseudo_heads == 16 else MANY


def by_rule(shape: Shape, rule: Rule, warps: int = 8) -> Config:
    """Tiles in proportion at widths over d = 128, as large as memory on chip allows."""
    factor = min(1.0, 128 / (shape.columns * shape.bytes))
    most_tokens = max(1, MOST_READ // shape.token_bytes)
    queries = _tile(shape.shared, int(rule.query_rows * factor), most_tokens)
    keys = _tile(shape.pseudo_heads, int(rule.key_rows * factor), most_tokens)
    read = max(queries.tokens, keys.tokens) * shape.token_bytes
    return Config(queries, keys, warps, rule.stages if read <= MOST_DOUBLED else 1)


def _tile(shared: int, size: int, most_tokens: int) -> Tile:
    """About `size` rows in all, for pseudo-heads of which `shared` belong together."""
    if shared < 16:
        rows = power_of_two(shared)
    else:
        # The least padding; of equals the largest, which goes over the other side least often.
        rows = min((16, 32, 64), key=lambda rows: (-(-shared // rows) * rows, -rows))
    rows = min(rows, max(16, size))
    return Tile(rows, max(1, min(size // rows, most_tokens)))


@functools.cache
def tuned() -> dict[tuple[str, Shape], Config]:
    """What `tuned.json` says, by kernel and shape; nothing where it is not there."""
    file = resources.files("iha.kernels") / "tuned.json"
    if not file.is_file():
        return {}
    rows: list[dict[str, Any]] = json.loads(file.read_text())["configs"]
    return {(row["kernel"], Shape(**row["shape"])): read(row["config"]) for row in rows}


def read(found: dict[str, Any]) -> Config:
    """A `Config` from what `dataclasses.asdict` made of one."""
    tiles = Tile(**found["query_tile"]), Tile(**found["key_tile"])
    return Config(*tiles, found["warps"], found["stages"])
