"""Tokens or heads of one layer spread over processes: right, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional

import iha
from tests.hf import families
from tests.stacks.processes import run

IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(12)[None]


def trained(**settings: Any) -> Any:
    return families.trained("llama", 3, **settings)


def refusal(model: Any, **given: Any) -> str:
    try:
        model(**given)
    except ValueError as error:
        return str(error)
    return "not refused"


def _over_all_tokens(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """What the ring computes that context parallelism puts in SDPA's place (on GPUs alone)."""
    assert options.pop("attn_mask") is None
    assert options.pop("is_causal")
    whole = []
    for tensor in (key, value):
        parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, tensor.contiguous())
        whole.append(torch.cat(parts, 2))
    place = torch.arange(query.shape[2]) + distributed.get_rank() * query.shape[2]
    mask = place[:, None] >= torch.arange(whole[0].shape[2])
    return _sdpa(query, *whole, attn_mask=mask, **options)


_sdpa = functional.scaled_dot_product_attention


@torch.no_grad()
def with_tokens_spread() -> Tensor:
    part = slice(6 * distributed.get_rank(), 6 * distributed.get_rank() + 6)
    model = trained(causal="flat")
    functional.scaled_dot_product_attention = _over_all_tokens
    found = model(IDS[:, part], position_ids=POSITIONS[:, part], use_cache=False).logits
    functional.scaled_dot_product_attention = _sdpa
    return found


@torch.no_grad()
def within_context_parallelism() -> list[str]:
    found: list[str] = []
    mesh = init_device_mesh("cpu", (2,))
    ids, positions = IDS.clone(), POSITIONS.repeat(2, 1)
    packed = torch.arange(12).remainder(3).repeat(2, 1)
    buffers = [ids, positions, packed]
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1]):
        given = {"input_ids": ids, "position_ids": positions}
        for settings in ({"causal": "token"}, {"window": 2}):
            found.append(refusal(trained(**settings), **given))
        model = trained(causal="flat")
        found.append(refusal(model, input_ids=ids, position_ids=packed))
        for backend in ("local", "flex", "fused", "reference", "streamed:local"):
            found.append(refusal(trained(window=2, backend=backend), **given))
    # And none of it afterwards.
    found.append(refusal(trained(causal="token"), input_ids=IDS))
    return found


@torch.no_grad()
def with_heads_spread() -> str:
    attention = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    attention["self_attn.o_proj"] = RowwiseParallel()
    model = trained()
    for layer in model.model.layers:
        parallelize_module(layer, init_device_mesh("cpu", (2,)), attention)
    return refusal(model, input_ids=IDS)


def everything() -> tuple[Tensor, list[str], str]:
    return with_tokens_spread(), within_context_parallelism(), with_heads_spread()


@pytest.fixture(scope="module")
def ranks() -> list[tuple[Tensor, list[str], str]]:
    return run(everything)


def test_flat_causality_is_right_within_context_parallelism(ranks: Any) -> None:
    with torch.no_grad():
        expected = trained(causal="flat")(IDS).logits
    found = torch.cat([rank[0] for rank in ranks], 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_sends_a_mask_is_refused_within_context_parallelism(ranks: Any) -> None:
    for _, (*refused, after), _ in ranks:
        assert len(refused) == 8
        assert all("within context parallelism this call is wrong" in why for why in refused)
        assert all("within this process's tokens; use 'sdpa'" in why for why in refused[3:])
        assert after == "not refused"


def test_tensor_parallelism_is_refused(ranks: Any) -> None:
    for _, _, why in ranks:
        assert "4 query and 2 key/value heads" in why
        assert "holds 2 and 1 of them (tensor parallelism)" in why


WINDOW, PART = 3, 4  # of tokens; three processes, so that one has neighbours on both sides


def layer_of(part: slice, causal: str, layout: str) -> dict[str, Tensor]:
    """Output and gradients of a window layer for the queries of `part`, and keys up to its end."""
    torch.manual_seed(0)
    mixing = iha.HeadMixing(4, num_kv_heads=2, pseudo_heads=3, init="scratch")
    base = [torch.randn(2, heads, 3 * PART, 8) for heads in (4, 2, 2)]
    weights = torch.randn(2, 4, 3 * PART, 8)[:, :, part]
    mine = [tensor[:, :, part].clone().requires_grad_() for tensor in base]
    turned = [t.transpose(1, 2) if layout == "bshd" else t for t in mine]
    if part.stop - part.start < 3 * PART:
        turned[1:] = iha.window_halo(turned[1], turned[2], WINDOW, layout=layout)
    output = mixing(*turned, window=WINDOW, causal=causal, layout=layout)
    output = output.transpose(1, 2) if layout == "bshd" else output
    (output * weights).sum().backward()
    gradients = dict(zip(("query", "key", "value"), (t.grad for t in mine), strict=True))
    return {
        "output": output.detach(),
        **gradients,
        **{n: p.grad for n, p in mixing.named_parameters()},
    }


def with_halos(causal: str, layout: str) -> tuple[dict[str, Tensor], str]:
    first = PART * distributed.get_rank()
    found = layer_of(slice(first, first + PART), causal, layout)
    keys = torch.zeros(1, 2, PART, 8)
    try:
        iha.window_halo(keys, keys, PART + 1)
    except ValueError as error:
        return found, str(error)
    return found, "not refused"


@pytest.mark.parametrize(("causal", "layout"), [("flat", "bhsd"), ("token", "bshd")])
def test_window_layers_exchange_a_few_keys(causal: str, layout: str) -> None:
    expected = layer_of(slice(0, 3 * PART), causal, layout)
    parts, refused = zip(*run(with_halos, causal, layout, world=3), strict=True)
    for name, tensor in expected.items():
        cut = name in ("output", "query", "key", "value")
        found = [part[name] for part in parts]
        whole = torch.cat(found, 2) if cut else torch.stack(found).sum(0)
        torch.testing.assert_close(whole, tensor, atol=1e-5, rtol=1e-5)
    assert all("window must not reach" in why for why in refused)
