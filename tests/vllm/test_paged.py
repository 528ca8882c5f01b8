"""The decoding kernel over pages, under Triton's interpreter; this needs no vLLM."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

import iha
from iha.hf.layer_settings import LayerSettings
from iha.hf.sequences import attend_sequences, layer_attention, reach
from iha.integrations.vllm.paged import paged_attention
from iha.rotary import inverse_frequencies, phase_tables

H, G, P, D, PAGE, BLOCKS = 4, 2, 3, 16, 16, 40
LENGTHS = [3, 16, 37, 80, 64, 0]
COUNTS = [1, 2, 1, 2, 12, 0]  # the last but one reads a prompt, the last is padding


class Settings(LayerSettings):
    """With phases, and no model that has them."""

    def phase(self, device: torch.device) -> Any:
        if self.rope == "token":
            return None
        return phase_tables(self.pseudo_heads, inverse_frequencies(D), self.rope)


def layer(**changed: Any) -> Settings:
    given: dict[str, Any] = {
        "num_heads": H, "num_kv_heads": G, "pseudo_heads": P, "causal": "flat", "window": None,
        "rope": "token", "rotary": "half", "rotary_start": 0, "positions": None, "backend": "auto",
    }  # fmt: skip
    return Settings(**{**given, **changed})


def poisoned(seen: int | None, heads_first: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A cache, its block table, and keys beside values of each sequence. The rest of it is NaN."""
    shape = (BLOCKS, G, PAGE, 2 * D) if heads_first else (BLOCKS, PAGE, G, 2 * D)
    cache = torch.full(shape, float("nan"))
    cache = cache if heads_first else cache.transpose(1, 2)
    free = iter(torch.randperm(BLOCKS - 1).tolist())
    table = torch.full((len(LENGTHS), 8), BLOCKS - 1, dtype=torch.int32)
    cached = [torch.randn(G, S, 2 * D) for S in LENGTHS]
    for b, (S, N) in enumerate(zip(LENGTHS, COUNTS, strict=True)):
        oldest = 0 if seen is None else max(0, S - N - seen)
        for i in range(oldest // PAGE, -(-S // PAGE)):  # older pages are given back
            table[b, i] = block = next(free)
            for s in range(max(oldest, i * PAGE), min(S, (i + 1) * PAGE)):
                cache[block, :, s % PAGE] = cached[b][:, s]
    return cache, table, cached


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("rope", ["token", "fractional"])
@pytest.mark.parametrize(
    ("causal", "window", "own", "queries"),
    [
        ("flat", None, None, P),
        ("flat", 9, None, P),
        ("flat", 9, None, 2),
        ("token", 9, None, P),
        ("token", 30, 7, P),
        ("token", 30, 7, 1),
    ],
)
def test_a_step_over_pages(
    causal: Any, window: int | None, own: int | None, queries: int, rope: Any, heads_first: bool
) -> None:
    torch.manual_seed(0)
    mixing = iha.HeadMixing(
        H, num_kv_heads=G, pseudo_heads=P, pseudo_queries=queries, init="scratch"
    )
    settings = layer(causal=causal, window=window, rope=rope)
    seen = reach(settings, own)
    cache, table, cached = poisoned(seen, heads_first)
    query = torch.randn(sum(COUNTS), H, D)
    options: Any = {"sliding_window": own, "scale": 0.3, "softcap": 20.0}

    def fetch(batch: list[int], positions: Tensor) -> tuple[Tensor, Tensor]:
        assert batch == [4]  # what decodes is not gathered
        return cached[4][None, :, positions[0], :D], cached[4][None, :, positions[0], D:]

    with torch.no_grad():
        attend = layer_attention(mixing, settings, device=query.device, **options)
        decode = paged_attention(
            mixing, settings, cache, pages=table, lengths=torch.tensor(LENGTHS).int(), **options
        )
        found = attend_sequences(query, COUNTS, LENGTHS, fetch, attend, reach=seen, decode=decode)
        limit = min(window or 99, own or 99)
        starts = accumulate([0, *COUNTS])
        for b, (start, N) in enumerate(zip(starts, COUNTS, strict=False)):
            if N == 0:
                continue
            key, value = cached[b][None, ..., :D], cached[b][None, ..., D:]
            alone = mixing(
                query[None, start : start + N].transpose(1, 2), key, value,
                causal=causal, window=None if limit == 99 else limit,
                phase=settings.phase(query.device), scale=0.3, softcap=20.0, backend="reference",
            )  # fmt: skip
            expected = alone[0].transpose(0, 1)
            torch.testing.assert_close(found[start : start + N], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("changed", "own"),
    [({}, 7), ({"rope": "fractional", "rotary_start": 4}, None)],
)
def test_what_the_kernel_does_not_fit_is_gathered(changed: Any, own: int | None) -> None:
    mixing = iha.HeadMixing(H, num_kv_heads=G, pseudo_heads=P, init="scratch")
    cache, table, _ = poisoned(None, True)
    lengths = torch.tensor(LENGTHS)
    assert (
        paged_attention(
            mixing, layer(**changed), cache, pages=table, lengths=lengths, sliding_window=own,
            scale=0.3, softcap=None,
        )
        is None
    )  # fmt: skip


def test_a_device_that_it_does_not_run_on_is_named() -> None:
    mixing = iha.HeadMixing(H, num_kv_heads=G, pseudo_heads=P, init="scratch")
    cache = torch.zeros(BLOCKS, G, PAGE, 2 * D, dtype=torch.bfloat16)
    empty = torch.zeros(1, 8, dtype=torch.int32)
    options: Any = {"sliding_window": None, "scale": 0.3, "softcap": None}
    with pytest.raises(ValueError, match="iha_paged_kernel"):
        paged_attention(mixing, layer(), cache, pages=empty, lengths=empty[0], **options)
