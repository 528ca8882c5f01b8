"""Sequences of a serving step: each gets what it would get alone, and reads nothing too old."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import iha
from iha.hf.layer_settings import LayerSettings
from iha.hf.sequences import attend_sequences, layer_attention, reach

H, G, P, D = 4, 2, 3, 8
COUNTS = [1, 5, 0, 1, 2, 1, 40, 2, 1]
LENGTHS = [1, 5, 7, 37, 9, 36, 64, 33, 50]


def settings(causal: Any, window: int | None) -> LayerSettings:
    return LayerSettings(
        num_heads=H, num_kv_heads=G, pseudo_heads=P, causal=causal, window=window, rope="token",
        rotary="half", rotary_start=0, positions=None, backend="auto",
    )  # fmt: skip


@pytest.mark.parametrize("sliding_window", [None, 6])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("causal", ["flat", "token"])
def test_each_sequence_gets_what_it_would_get_alone(
    causal: Any, window: int | None, sliding_window: int | None
) -> None:
    torch.manual_seed(0)
    mixing = iha.HeadMixing(H, num_kv_heads=G, pseudo_heads=P, init="scratch")
    layer = settings(causal, window)
    query = torch.randn(sum(COUNTS) + 3, H, D)  # three rows of padding
    cached = [torch.randn(2, G, S, D) for S in LENGTHS]
    seen = reach(layer, sliding_window)
    starts = [sum(COUNTS[:i]) for i in range(len(COUNTS))]

    expected = torch.zeros_like(query)
    for start, N, (key, value) in zip(starts, COUNTS, cached, strict=True):
        if N == 0:
            continue
        n = torch.arange(key.shape[1] - N, key.shape[1])[:, None]
        near = n - torch.arange(key.shape[1]) < (sliding_window or 10**6)
        alone = mixing(
            query[None, start : start + N].transpose(1, 2),
            key[None],
            value[None],
            attn_mask=near[None, None],
            causal=causal,
            window=window,
            backend="reference",
        )
        expected[start : start + N] = alone[0].transpose(0, 1)

    if seen is not None:
        for N, (key, value) in zip(COUNTS, cached, strict=True):
            gone = max(0, key.shape[1] - N - seen)
            key[:, :gone] = value[:, :gone] = float("nan")  # an engine has given these pages away
    calls = 0

    def fetch(batch: list[int], positions: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        rows = [cached[i][:, :, positions[b]] for b, i in enumerate(batch)]
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    attend = layer_attention(
        mixing, layer, device=query.device, sliding_window=sliding_window, scale=None, softcap=None
    )
    found = attend_sequences(query, COUNTS, LENGTHS, fetch, attend, reach=seen)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    assert calls < sum(count > 0 for count in COUNTS)  # those that decode share a call
