"""Any value for any argument: it is accepted and works, or it is refused by the argument's name.

Arguments are read from the signatures, so a new one is tested from its first day.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import iha
from tests.arguments import tensors
from tests.hf.families import tiny

SIZES = (-1, 0, 1, 2, 3, 2**70, -(2**70))  # none that fits an int and no memory


def unusual(name: str) -> Tensor:
    """A tensor that is no dense one of real numbers on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls these layouts prototypes
        dense = torch.eye(3)
        return {
            "nested": lambda: torch.nested.nested_tensor([dense, dense[:1]]),
            "jagged": lambda: torch.nested.nested_tensor([dense, dense[:1]], layout=torch.jagged),
            "sparse": dense.to_sparse,
            "compressed": dense.to_sparse_csr,
            "meta": lambda: dense.to("meta"),
            "no numbers": lambda: torch.empty(0),
        }[name]()


DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.complex64, torch.bool, torch.uint8, torch.int64,
)  # fmt: skip
shapes = st.lists(st.integers(0, 4), max_size=5)
dense = st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), shapes, st.sampled_from(DTYPES))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(SIZES),
    st.floats(),
    st.sampled_from(SIZES).filter(lambda n: abs(n) < 9).map(np.int64),
    st.floats(width=32).map(np.float32),
    st.sampled_from([np.bool_(True), 1j, b"auto", "", "cuda:99", "gpu", "cpu:x", "Flat", "2"]),
    st.text(max_size=4),
)
values = st.one_of(
    scalars,
    dense,
    st.sampled_from(["nested", "jagged", "sparse", "compressed", "meta", "no numbers"]).map(
        unusual
    ),
    st.lists(scalars, max_size=3),
    st.tuples(dense, dense),
    st.dictionaries(scalars, scalars, max_size=2),
    st.sampled_from([torch.int64, torch.float8_e5m2, np.ones(2), np.ones(()), object(), int]),
)


def arguments(function: Callable[..., Any], *also: str) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.kind in kinds and p.name != "self"] + [*also]


def accepted(name: str, call: Callable[[], Any]) -> Any:
    """What `call` gives; None if it refuses the argument by its name."""
    try:
        return call()
    except (TypeError, ValueError) as error:
        refusal = str(error)
    assert re.search(rf"\b{name}\b", refusal), f"{name} is not named: {refusal}"
    return None


def property_test(test: Callable[..., None]) -> Callable[..., None]:
    return settings(max_examples=30)(given(value=values)(test))


@pytest.mark.parametrize("name", arguments(iha.interleaved_head_attention))
@property_test
def test_the_operator(name: str, value: Any) -> None:
    good = tensors(B=1, H=2, G=1, N=3, S=4, d=2, P=2, dtype=torch.float32)
    output = accepted(name, partial(iha.interleaved_head_attention, **{**good, name: value}))
    assert output is None or bool(output.isfinite().all())


@pytest.mark.parametrize("name", arguments(iha.HeadMixing))
@property_test
def test_head_mixing(name: str, value: Any) -> None:
    mixing = accepted(
        name, partial(iha.HeadMixing, **{"num_heads": 6, "init": "upcycle", name: value})
    )
    if mixing is not None:
        query = torch.randn(1, mixing.num_heads, 3, 2, device=mixing.alpha_q.device)
        key = query[:, : mixing.num_kv_heads]
        assert finite(mixing(query, key, key))


@pytest.mark.parametrize("name", arguments(iha.InterleavedHeadAttention))
@property_test
def test_the_layer(name: str, value: Any) -> None:
    good: dict[str, Any] = {"embed_dim": 12, "num_heads": 2, "pseudo_heads": 2, "init": "scratch"}
    context = None
    if name == "context_dim":
        good |= {"causal": None, "rope": None}
    layer = accepted(name, partial(iha.InterleavedHeadAttention, **{**good, name: value}))
    if layer is not None:
        weight = layer.q_proj.weight
        x = torch.randn(1, 3, layer.embed_dim, device=weight.device, dtype=weight.dtype)
        if name == "context_dim":
            context = torch.randn(1, 4, layer.context_dim)
        assert finite(layer(x, context))


@pytest.mark.parametrize("name", arguments(iha.InterleavedHeadAttention.forward))
@property_test
def test_what_the_layer_is_called_with(name: str, value: Any) -> None:
    crossing = {"causal": None, "rope": None} if name == "context" else {}
    layer = iha.InterleavedHeadAttention(4, 2, pseudo_heads=2, init="scratch", **crossing)
    output = accepted(name, partial(layer, **{"x": torch.randn(1, 3, 4), name: value}))
    assert output is None or finite(output)


@property_test
def test_the_capacity_of_a_cache(value: Any) -> None:
    cache = accepted("capacity", lambda: iha.KeyValueCache(value))
    if cache is not None:
        assert cache.append(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))[0].shape[2] == 1


@pytest.mark.parametrize("capacity", [None, 6])
@pytest.mark.parametrize("name", ["key", "value"])
@property_test
def test_what_a_cache_is_given(name: str, capacity: int | None, value: Any) -> None:
    """Refused, a call leaves the cache as it was."""
    cache = iha.KeyValueCache(capacity)
    good = {"key": torch.ones(1, 1, 2, 3), "value": torch.ones(1, 1, 2, 3)}
    for _ in range(2):
        before = cache.length
        if accepted(name, partial(cache.append, **{**good, name: value})) is None:
            assert cache.length == before
        keys, found = cache.append(**good)
        assert keys.shape == found.shape == (1, 1, cache.length, 3)


@pytest.mark.parametrize("name", arguments(iha.attention_flops))
@property_test
def test_attention_flops(name: str, value: Any) -> None:
    good = {"seq_len": 16, "num_heads": 4, "head_dim": 2, "pseudo_heads": 2}
    flops = accepted(name, partial(iha.attention_flops, **{**good, name: value}))
    assert flops is None or (type(flops) is int and flops > 0)


@pytest.mark.parametrize("name", arguments(iha.hybrid_schedule))
@property_test
def test_hybrid_schedule(name: str, value: Any) -> None:
    good = {"num_layers": 5, "seq_len": 64, "pseudo_heads": 2}
    schedule = accepted(name, partial(iha.hybrid_schedule, **{**good, name: value}))
    assert schedule is None or schedule.flops(4, 2) > 0


@pytest.mark.parametrize("name", arguments(iha.parameter_groups))
@property_test
def test_parameter_groups(name: str, value: Any) -> None:
    good = {"model": iha.HeadMixing(2, init="upcycle"), "lr": 1e-3}
    groups = accepted(name, partial(iha.parameter_groups, **{**good, name: value}))
    if groups is not None:
        iha.check_optimizers(good["model"], torch.optim.AdamW(groups))


@cache
def llama() -> Any:
    return tiny("llama", num_hidden_layers=2)


IDS = torch.arange(3, 9)[None]
keys = st.one_of(scalars, st.sampled_from([0, 1, 5, "*", "*.1.*", "layers.0.self_attn", "x*"]))
lists_of_layers = st.lists(keys, min_size=1, max_size=2)
mappings = st.dictionaries(keys, st.one_of(scalars, st.just(2)), max_size=2)
sizes_and_layers = st.one_of(values, lists_of_layers, mappings)


@pytest.mark.parametrize("name", arguments(iha.upcycle))
@settings(max_examples=30)
@given(value=sizes_and_layers)
def test_upcycle(name: str, value: Any) -> None:
    """Refused, it leaves the model as it was."""
    model = copy.deepcopy(llama())
    good = {"model": model, "pseudo_heads": 2}
    upcycled = accepted(name, partial(iha.upcycle, **{**good, name: value}))
    if upcycled is None:
        assert getattr(model.config, "iha", None) is None
        assert model.state_dict().keys() == llama().state_dict().keys()
        assert torch.equal(model(IDS).logits, llama()(IDS).logits)
    else:
        json.dumps(upcycled.config.iha)
        assert finite(upcycled(IDS).logits)


def finite(output: Tensor) -> bool:
    return output.is_meta or bool(output.isfinite().all())
