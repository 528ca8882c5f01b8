"""The FLOP-matched schedule, its formulas by hand, and the paper's model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iha import attention_flops, hybrid_schedule


def test_plain_attention_by_hand() -> None:
    # 3 heads, 10 tokens, d = 5: two products of 2·5 FLOPs for each of 10²/2 causal pairs.
    assert attention_flops(10, 3, 5) == 3 * (2 * 2 * 5) * 50


def test_global_attention_by_hand() -> None:
    # P = 2: 20²/2 pairs a head. Mixing, each a product of 2·N·d·P·(heads in)·(heads out) FLOPs:
    pairs = 3 * (2 * 2 * 5) * 200
    query = collapse = 2 * 10 * 5 * 2 * 3 * 3
    key = value = 2 * 10 * 5 * 2 * 3 * 3
    assert attention_flops(10, 3, 5, 2) == pairs + query + key + value + collapse


def test_grouped_window_attention_by_hand() -> None:
    # P = 2, W = 3: each of 20 virtual tokens sees 6; 4 query heads share 2 key/value heads.
    pairs = 4 * (2 * 2 * 5) * 20 * 6
    query = collapse = 2 * 10 * 5 * 2 * 4 * 4
    key = value = 2 * 10 * 5 * 2 * 2 * 2
    flops = attention_flops(10, 4, 5, 2, num_kv_heads=2, window=3)
    assert flops == pairs + query + key + value + collapse


def test_a_window_never_costs_more_than_none() -> None:
    without = attention_flops(64, 4, 8, 2)
    assert attention_flops(64, 4, 8, 2, window=64) == without
    assert attention_flops(64, 4, 8, 2, window=33) == without
    assert attention_flops(64, 4, 8, 2, window=31) < without


def test_the_papers_model() -> None:
    schedule = hybrid_schedule(num_layers=26, seq_len=8192, pseudo_heads=20)
    assert schedule.window == 10
    assert [layer for layer in range(26) if layer not in schedule.layers] == [4, 9, 14, 19, 24]
    plain = schedule.plain_flops(num_heads=20, head_dim=128)
    assert plain == 26 * 4 * 20 * 128 * 8192**2 // 2
    mixing = 21 * 2 * 8192 * 128 * 20 * 4 * 20**2
    matched = schedule.flops(num_heads=20, head_dim=128) - mixing
    assert 0.97 * plain < matched <= plain  # 10 tokens of the 10.24 that would match it exactly


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 8), st.integers(1, 8))
def test_attention_is_matched_where_the_window_is_whole(
    layers: int, P: int, W: int, H: int
) -> None:
    schedule = hybrid_schedule(layers, 2 * P**2 * W, P)
    assert schedule.window == W
    N, d = schedule.seq_len, 16
    mixing = len(schedule.layers) * 2 * N * d * P * 4 * H**2 if P > 1 else 0
    assert schedule.flops(H, d) - mixing == schedule.plain_flops(H, d)


def test_grouped_keys_make_the_mixing_cheaper() -> None:
    schedule = hybrid_schedule(10, 512, 4)
    saved = schedule.flops(8, 16) - schedule.flops(8, 16, num_kv_heads=2)
    assert saved == 8 * 2 * 512 * 16 * 4 * 2 * (8**2 - 2**2)


@given(st.integers(1, 60))
def test_every_fifth_layer_stays_plain(layers: int) -> None:
    schedule = hybrid_schedule(layers, 64, 2)
    plain = set(range(layers)) - set(schedule.layers)
    assert plain == set(range(4, layers, 5))


def test_a_sequence_too_short_for_a_window_is_refused() -> None:
    assert hybrid_schedule(5, 32, 4).window == 1
    with pytest.raises(ValueError, match=r"^seq_len must be at least 2·Pq·P = 32 .* got 31;"):
        hybrid_schedule(5, 31, 4)


@pytest.mark.parametrize(("layers", "P"), [(0, 4), (-1, 4), (5, 0), (5, -2)])
def test_sizes_below_one_are_refused(layers: int, P: int) -> None:
    with pytest.raises(ValueError, match=r"^(num_layers|pseudo_heads) must be at least 1, got"):
        hybrid_schedule(layers, 8192, P)


@pytest.mark.parametrize(
    ("pattern", "last_global", "layers", "expected"),
    [
        ("SSSL", True, 12, "SSSLSSSLSSSL"),
        ("SSSL", True, 10, "SSSLSSSLSL"),
        ("SSSL", False, 10, "SSSLSSSLSS"),
        ("L", False, 3, "LLL"),
        ("S", True, 3, "SSL"),
    ],
)
def test_a_pattern_is_repeated(pattern: str, last_global: bool, layers: int, expected: str) -> None:
    schedule = hybrid_schedule(layers, 64, 2, pattern=pattern, last_global=last_global)
    short = schedule.layers
    assert "".join("S" if i in short else "L" for i in range(layers)) == expected


@pytest.mark.parametrize("pattern", ["", "SSG", "sssl", None, 5])
def test_a_pattern_of_other_letters_is_refused(pattern: object) -> None:
    with pytest.raises(ValueError, match=r"^pattern must be a string of S and L"):
        hybrid_schedule(5, 64, 2, pattern=pattern)  # type: ignore[arg-type]


def test_the_backward_pass_and_the_mean_of_a_token() -> None:
    forward = attention_flops(10, 4, 5, 2, window=3)
    assert attention_flops(10, 4, 5, 2, window=3, backward=True) == 3 * forward
    assert attention_flops(10, 4, 5, 2, window=3, per_token=True) == forward // 10
    both = attention_flops(10, 4, 5, 2, window=3, backward=True, per_token=True)
    assert both == 3 * forward // 10
