"""Tile sizes: what the rule gives, and that what tuning found takes its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from iha.kernels import configs
from iha.kernels.configs import Config, Shape
from iha.kernels.layout import Tile

PAPER = Shape(pseudo_heads=16, shared=16, width=128, bytes=2, generation=9)


@pytest.fixture(autouse=True)
def _untuned() -> Iterator[None]:
    yield
    configs.tuned.cache_clear()
    configs.config.cache_clear()


@pytest.mark.parametrize("kernel", configs.RULES)
@pytest.mark.parametrize("generation", [9, 10])
def test_tiles_are_powers_of_two_and_hold_a_token(kernel: configs.Kernel, generation: int) -> None:
    for P in range(1, 33):
        for width in (32, 64, 96, 128, 256):
            for groups, size in ((1, 2), (3, 2), (8, 4)):
                found = configs.config(kernel, Shape(P, groups * P, width, size, generation))
                for tile, shared in ((found.query_tile, P * groups), (found.key_tile, P)):
                    assert tile.rows & (tile.rows - 1) == 0
                    assert tile.tokens & (tile.tokens - 1) == 0
                    # No tile is half empty for want of pseudo-heads.
                    assert tile.rows < 2 * shared or tile.rows == 16


def test_the_paper_s_layer() -> None:
    assert configs.config("forward", PAPER) == Config(Tile(16, 8), Tile(16, 4), 8, 2)


def test_wider_heads_and_longer_numbers_get_smaller_tiles() -> None:
    def size(**changes: int) -> int:
        found = configs.config("forward", dataclasses.replace(PAPER, **changes))
        return found.query_tile.size * found.key_tile.size

    assert size(width=256) < size() > size(bytes=4)
