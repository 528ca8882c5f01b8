"""Bad arguments are refused by name, with what came; good ones of unusual kinds are not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from iha import explain_backend, interleaved_head_attention
from tests.arguments import NAMES, tensors

Given = dict[str, Tensor]
Change = Callable[[Given], dict[str, Any]]


def good(**sizes: Any) -> Given:
    return tensors(**{"B": 2, "H": 4, "G": 2, "N": 5, "S": 7, "d": 4, "P": 3, **sizes})


def table(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, **options)


def mask(*shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(shape, dtype=dtype)


ONE_OF_MANY = {"query": 1, "key": 7, "value": 7}

# What is changed in good arguments, what is raised, and what the message must say.
BAD: dict[str, tuple[Change, type[Exception], list[str]]] = {
    # query, key, value
    "query is a list": (lambda g: {"query": [1.0]}, TypeError, ["^query", "list"]),
    "key is an array": (lambda g: {"key": g["key"].numpy()}, TypeError, ["^key", "ndarray"]),
    "value is None": (lambda g: {"value": None}, TypeError, ["^value", "NoneType"]),
    "query has 3 dimensions": (
        lambda g: {"query": g["query"][0]},
        ValueError,
        ["^query", "batch, heads, tokens", "(4, 5, 4)"],
    ),
    "value has 5 dimensions": (
        lambda g: {"value": g["value"][None]},
        ValueError,
        ["^value", "(1, 2, 2, 7, 4)"],
    ),
    "query has no tokens": (
        lambda g: {"query": g["query"][:, :, :0]},
        ValueError,
        ["^query", "at least one", "(2, 4, 0, 4)"],
    ),
    "key has no heads": (
        lambda g: {"key": g["key"][:, :0]},
        ValueError,
        ["^key", "at least one", "(2, 0, 7, 4)"],
    ),
    "key has no tokens": (
        lambda g: {"key": g["key"][:, :, :0], "value": g["value"][:, :, :0], "causal": None},
        ValueError,
        ["^key", "at least one", "(2, 2, 0, 4)"],
    ),
    "heads have no dimension": (
        lambda g: {name: g[name][..., :0] for name in NAMES[:3]},
        ValueError,
        ["^query", "at least one", "(2, 4, 5, 0)"],
    ),
    "query is of integers": (
        lambda g: {"query": g["query"].long()},
        TypeError,
        ["^query", "floating", "torch.int64"],
    ),
    "query is complex": (
        lambda g: {"query": g["query"] + 0j},
        TypeError,
        ["^query", "floating", "torch.complex128"],
    ),
    "key of another dtype": (
        lambda g: {"key": g["key"].float()},
        TypeError,
        ["share a dtype", "torch.float64 for query", "torch.float32 for key"],
    ),
    "value of another dtype": (
        lambda g: {"value": g["value"].bfloat16()},
        TypeError,
        ["share a dtype", "torch.bfloat16 for value"],
    ),
    "key on another device": (
        lambda g: {"key": g["key"].to("meta")},
        ValueError,
        ["^key", "device of query", "meta", "cpu"],
    ),
    "value on another device": (
        lambda g: {"value": g["value"].to("meta")},
        ValueError,
        ["^value", "meta", "cpu"],
    ),
    "value shorter than key": (
        lambda g: {"value": g["value"][:, :, :6]},
        ValueError,
        ["^value", "shape of key", "(2, 2, 6, 4)", "(2, 2, 7, 4)"],
    ),
    "another batch": (
        lambda g: {"key": g["key"][:1], "value": g["value"][:1]},
        ValueError,
        ["^key", "batch size", "(1, 2, 7, 4)", "(2, 4, 5, 4)"],
    ),
    "another head dimension": (
        lambda g: {"query": g["query"][..., :2]},
        ValueError,
        ["^key", "head dimension", "(2, 2, 7, 4)", "(2, 4, 5, 2)"],
    ),
    "heads that do not divide": (
        lambda g: {"query": g["query"][:, :3]},
        ValueError,
        ["^key", "divides", "2 and 3", "(2, 2, 7, 4)", "(2, 3, 5, 4)"],
    ),
    "more key heads than query heads": (
        lambda g: {"query": g["query"][:, :1]},
        ValueError,
        ["^key", "divides", "2 and 1"],
    ),
    "fewer keys than queries, causal": (
        lambda g: {"key": g["key"][:, :, :3], "value": g["value"][:, :, :3]},
        ValueError,
        ["^key", "as many tokens as query", "3 and 5", "causal=None"],
    ),
    "fewer keys than queries, window": (
        lambda g: {
            **{name: g[name][:, :, :3] for name in ("key", "value")},
            "causal": None,
            "window": 2,
        },
        ValueError,
        ["^key", "window", "3 and 5"],
    ),
    "fewer keys than queries, documents": (
        lambda g: {
            **{name: g[name][:, :, :3] for name in ("key", "value")},
            "causal": None,
            "document_ids": torch.zeros(2, 3, dtype=torch.long),
        },
        ValueError,
        ["^key", "document_ids", "3 and 5"],
    ),
    # The mixing tensors
    "alpha_q is a list": (lambda g: {"alpha_q": [[1.0]]}, TypeError, ["^alpha_q", "list"]),
    "collapse is None": (lambda g: {"collapse": None}, TypeError, ["^collapse", "NoneType"]),
    "alpha_q has 2 dimensions": (
        lambda g: {"alpha_q": g["alpha_q"][..., 0]},
        ValueError,
        ["^alpha_q", "(4, 4, 1)", "got (4, 4)"],
    ),
    "alpha_q has no pseudo-head": (
        lambda g: {"alpha_q": g["alpha_q"][..., :0]},
        ValueError,
        ["^alpha_q", "at least one pseudo-head", "(4, 4, 0)"],
    ),
    "alpha_q for other heads": (
        lambda g: {"alpha_q": g["alpha_q"][:2, :2]},
        ValueError,
        ["^alpha_q", "(4, 4, 3)", "4 query heads", "got (2, 2, 3)"],
    ),
    "alpha_k of the query heads": (
        lambda g: {"alpha_k": g["alpha_q"]},
        ValueError,
        ["^alpha_k", "(2, 2, 3)", "2 key/value heads", "got (4, 4, 3)"],
    ),
    "alpha_k of another P": (
        lambda g: {"alpha_k": g["alpha_k"][..., :2]},
        ValueError,
        ["^alpha_k", "Pq = 3 pseudo-heads of alpha_q", "got shape (2, 2, 2)"],
    ),
    "alpha_v of another P": (
        lambda g: {"alpha_v": g["alpha_v"][..., :2]},
        ValueError,
        ["^alpha_v", "P = 3 of alpha_k", "got (2, 2, 2)"],
    ),
    "collapse of another shape": (
        lambda g: {"collapse": g["collapse"].flatten(1)},
        ValueError,
        ["^collapse", "(4, 4, 3) or (4, 3)", "got (4, 12)"],
    ),
    "rectangular collapse": (
        lambda g: {"collapse": g["collapse"][:, :2]},
        ValueError,
        ["^collapse", "got (4, 2, 3)"],
    ),
    "alpha_v of integers": (
        lambda g: {"alpha_v": g["alpha_v"].int()},
        TypeError,
        ["^alpha_v", "floating", "torch.int32"],
    ),
    "collapse is boolean": (
        lambda g: {"collapse": g["collapse"] > 0},
        TypeError,
        ["^collapse", "floating", "torch.bool"],
    ),
    "alpha_k on another device": (
        lambda g: {"alpha_k": g["alpha_k"].to("meta")},
        ValueError,
        ["^alpha_k", "device of query", "meta", "cpu"],
    ),
    # Names and numbers
    "causal as others write it": (
        lambda g: {"causal": True},
        ValueError,
        ["^causal", "one of 'flat', 'token', None", "True"],
    ),
    "causal false": (lambda g: {"causal": False}, ValueError, ["^causal", "None", "False"]),
    "causal unknown": (lambda g: {"causal": "full"}, ValueError, ["^causal", "'full'"]),
    "rotary unknown": (
        lambda g: {"rotary": "neox"},
        ValueError,
        ["^rotary", "one of 'half', 'pairs'", "'neox'"],
    ),
    "window of nothing": (lambda g: {"window": 0}, ValueError, ["^window", "at least 1", "0"]),
    "window below zero": (lambda g: {"window": -1}, ValueError, ["^window", "-1"]),
    "window true": (lambda g: {"window": True}, TypeError, ["^window", "integer", "bool: True"]),
    "window fractional": (lambda g: {"window": 2.0}, TypeError, ["^window", "float: 2.0"]),
    "window is a pair": (lambda g: {"window": (3, 0)}, TypeError, ["^window", "tuple"]),
    "dropout of everything": (
        lambda g: {"dropout_p": 1.0},
        ValueError,
        ["^dropout_p", "at least 0 and below 1", "1.0"],
    ),
    "dropout below zero": (lambda g: {"dropout_p": -0.1}, ValueError, ["^dropout_p", "-0.1"]),
    "dropout nan": (lambda g: {"dropout_p": float("nan")}, ValueError, ["^dropout_p", "nan"]),
    "dropout None": (lambda g: {"dropout_p": None}, TypeError, ["^dropout_p", "NoneType"]),
    "scale nan": (lambda g: {"scale": float("nan")}, ValueError, ["^scale", "finite", "nan"]),
    "scale infinite": (lambda g: {"scale": float("inf")}, ValueError, ["^scale", "inf"]),
    "scale is a tensor": (
        lambda g: {"scale": torch.tensor(0.5)},
        TypeError,
        ["^scale", "number", "Tensor"],
    ),
    "softcap 0": (lambda g: {"softcap": 0.0}, ValueError, ["^softcap", "at least 1e-18", "0.0"]),
    "softcap nan": (lambda g: {"softcap": float("nan")}, ValueError, ["^softcap", "nan"]),
    "softcap infinite": (lambda g: {"softcap": float("inf")}, ValueError, ["^softcap", "inf"]),
    "softcap is a string": (lambda g: {"softcap": "50"}, TypeError, ["^softcap", "str: '50'"]),
    # layout, is_causal
    "query has tokens first": (
        lambda g: {"query": g["query"].transpose(1, 2)},
        ValueError,
        ["^query", "(batch, heads, tokens,", "4 heads", "(2, 5, 4, 4)", "that is layout='bshd'"],
    ),
    "one token of a query before a cache, tokens first": (
        lambda g: {n: g[n].transpose(1, 2)[:, -size:] for n, size in ONE_OF_MANY.items()},
        ValueError,
        ["^query", "got shape (2, 1, 4, 4)", "that is layout='bshd'"],
    ),
    "as many tokens as heads, tokens first": (
        lambda g: {n: g[n].transpose(1, 2)[:, :4] for n in NAMES[:3]},
        ValueError,
        ["^key", "2 heads", "got shape (2, 4, 2, 4)", "that is layout='bshd'"],
    ),
    "heads first where tokens were named": (
        lambda g: {"layout": "bshd"},
        ValueError,
        ["^query", "(batch, tokens, heads,", "(2, 4, 5, 4)", "that is layout='bhsd'"],
    ),
    "layout is unknown": (lambda g: {"layout": "bnhd"}, ValueError, ["^layout", "'bhsd', 'bshd'"]),
    "is_causal is a number": (lambda g: {"is_causal": 1}, TypeError, ["^is_causal", "int: 1"]),
    "is_causal without causality": (
        lambda g: {"is_causal": True, "causal": None},
        ValueError,
        ["^is_causal=True", "causal=None"],
    ),
    "is_causal says no": (
        lambda g: {"is_causal": False},
        ValueError,
        ["^is_causal=False", "causal='flat'"],
    ),
    # attn_mask
    "mask is a list": (lambda g: {"attn_mask": [True]}, TypeError, ["^attn_mask", "list"]),
    "mask is additive": (
        lambda g: {"attn_mask": mask(2, 1, 5, 7, dtype=torch.float32)},
        TypeError,
        ["^attn_mask", "True = attend", "torch.float32"],
    ),
    "mask of integers": (
        lambda g: {"attn_mask": mask(2, 1, 5, 7, dtype=torch.long)},
        TypeError,
        ["^attn_mask", "torch.int64"],
    ),
    "mask has 3 dimensions": (
        lambda g: {"attn_mask": mask(2, 5, 7)},
        ValueError,
        ["^attn_mask", "4 dimensions", "(2, 4, 5, 7)", "got (2, 5, 7)"],
    ),
    "mask has 2 dimensions": (
        lambda g: {"attn_mask": mask(2, 7)},
        ValueError,
        ["^attn_mask", "(2, 4, 5, 7)", "got (2, 7); give a padding mask as mask[:, None, None, :]"],
    ),
    "mask over other keys": (
        lambda g: {"attn_mask": mask(2, 1, 5, 5)},
        ValueError,
        ["^attn_mask", "(2, 4, 5, 7)", "got (2, 1, 5, 5)"],
    ),
    "mask over key heads": (
        lambda g: {"attn_mask": mask(2, 2, 5, 7)},
        ValueError,
        ["^attn_mask", "(2, 4, 5, 7)", "got (2, 2, 5, 7)"],
    ),
    "mask on another device": (
        lambda g: {"attn_mask": mask(1, 1, 5, 7).to("meta")},
        ValueError,
        ["^attn_mask", "meta", "cpu"],
    ),
    # document_ids
    "documents are a list": (
        lambda g: {"document_ids": [[0] * 7] * 2},
        TypeError,
        ["^document_ids", "list"],
    ),
    "documents are floats": (
        lambda g: {"document_ids": table(2, 7)},
        TypeError,
        ["^document_ids", "integers", "torch.float32"],
    ),
    "documents are boolean": (
        lambda g: {"document_ids": mask(2, 7)},
        TypeError,
        ["^document_ids", "integers", "torch.bool"],
    ),
    "documents are complex": (
        lambda g: {"document_ids": table(2, 7, dtype=torch.complex64)},
        TypeError,
        ["^document_ids", "integers", "torch.complex64"],
    ),
    "documents of the queries only": (
        lambda g: {"document_ids": torch.zeros(2, 5, dtype=torch.long)},
        ValueError,
        ["^document_ids", "(batch, key tokens) = (2, 7)", "got (2, 5)"],
    ),
    "documents without a batch": (
        lambda g: {"document_ids": torch.zeros(7, dtype=torch.long)},
        ValueError,
        ["^document_ids", "(2, 7)", "got (7,)"],
    ),
    "documents on another device": (
        lambda g: {"document_ids": torch.zeros(2, 7, dtype=torch.long, device="meta")},
        ValueError,
        ["^document_ids", "meta", "cpu"],
    ),
    # phase
    "phase is one tensor": (
        lambda g: {"phase": table(2, 3, 2)},
        TypeError,
        ["^phase", "pair (cos, sin)", "Tensor"],
    ),
    "phase is a list": (lambda g: {"phase": [table(3, 2)] * 2}, TypeError, ["^phase", "list"]),
    "phase of three": (
        lambda g: {"phase": (table(3, 2),) * 3},
        TypeError,
        ["^phase", "pair", "tuple of 3"],
    ),
    "phase of numbers": (
        lambda g: {"phase": (table(3, 2), 0.0)},
        TypeError,
        ["^phase[1] (sin)", "float"],
    ),
    "phase of integers": (
        lambda g: {"phase": (table(3, 2).long(), table(3, 2))},
        TypeError,
        ["^phase[0] (cos)", "floating", "torch.int64"],
    ),
    "phase has 1 dimension": (
        lambda g: {"phase": (table(3), table(3))},
        ValueError,
        ["^phase[0] (cos)", "(3, r/2)", "got (3,)"],
    ),
    "phase of another P": (
        lambda g: {"phase": (table(2, 2), table(2, 2))},
        ValueError,
        ["^phase[0] (cos)", "(3, r/2)", "got (2, 2)"],
    ),
    "phase wider than a head": (
        lambda g: {"phase": (table(3, 2), table(3, 3))},
        ValueError,
        ["^phase[1] (sin)", "head dimension 4", "got (3, 3)"],
    ),
    "phase without width": (
        lambda g: {"phase": (table(3, 0), table(3, 0))},
        ValueError,
        ["^phase[0] (cos)", "got (3, 0)"],
    ),
    "phase of two widths": (
        lambda g: {"phase": (table(3, 2), table(3, 1))},
        ValueError,
        ["^phase", "one shape", "(3, 2) (cos)", "(3, 1) (sin)"],
    ),
    "phase on another device": (
        lambda g: {"phase": (table(3, 2), table(3, 2, device="meta"))},
        ValueError,
        ["^phase[1] (sin)", "meta", "cpu"],
    ),
    # query_offset
    "offset below zero": (
        lambda g: {"query_offset": -1},
        ValueError,
        ["^query_offset", "between 0 and S - N = 2", "got -1"],
    ),
    "offset past the end": (
        lambda g: {"query_offset": 3},
        ValueError,
        ["^query_offset", "S - N = 2", "5 query tokens", "7 key tokens", "got 3"],
    ),
    "offset fractional": (lambda g: {"query_offset": 1.0}, TypeError, ["^query_offset", "float"]),
    "offset true": (lambda g: {"query_offset": True}, TypeError, ["^query_offset", "bool"]),
    "offset tensor of floats": (
        lambda g: {"query_offset": torch.tensor(1.0)},
        ValueError,
        ["^query_offset", "integer tensor", "torch.float32"],
    ),
    "offset tensor of truth": (
        lambda g: {"query_offset": torch.tensor(True)},
        ValueError,
        ["^query_offset", "torch.bool"],
    ),
    "offset for each batch element": (
        lambda g: {"query_offset": torch.tensor([0, 1])},
        ValueError,
        ["^query_offset", "one element", "(2,)"],
    ),
    "offset on another device": (
        lambda g: {"query_offset": torch.zeros((), dtype=torch.long, device="meta")},
        ValueError,
        ["^query_offset", "meta", "cpu"],
    ),
    # backend
    "backend unknown": (
        lambda g: {"backend": "fast"},
        ValueError,
        ["^backend", "'auto'", "'reference'", "'sdpa'", "'streamed:NAME'", "got 'fast'"],
    ),
    "backend inside unknown": (
        lambda g: {"backend": "streamed:fast"},
        ValueError,
        ["^backend", "got 'streamed:fast'"],
    ),
    "backend that cannot": (
        lambda g: {"backend": "local"},
        ValueError,
        ["^backend 'local' cannot", "window", "'sdpa'"],
    ),
    "backend that cannot, inside": (
        lambda g: {"backend": "streamed:sdpa", "softcap": 5.0},
        ValueError,
        ["^backend 'sdpa' cannot", "soft-cap", "'chunked'"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_refused_by_name(case: str) -> None:
    change, exception, said = BAD[case]
    arguments: dict[str, Any] = good()
    arguments.update(change(good()))
    with pytest.raises(exception) as raised:
        interleaved_head_attention(**arguments)
    assert type(raised.value) is exception
    for text in said:
        start, text = text.startswith("^"), text.removeprefix("^")
        assert re.search("^" * start + re.escape(text), str(raised.value)), raised.value


def test_the_arguments_that_the_table_changes_are_good() -> None:
    phase = (table(3, 2), table(3, 2))
    documents = torch.zeros(2, 7, dtype=torch.int32)
    options: dict[str, Any] = {"phase": phase, "document_ids": documents, "window": 3}
    options.update(attn_mask=mask(1, 4, 1, 7), query_offset=1, dropout_p=0, scale=1)
    assert interleaved_head_attention(**good(), **options).shape == (2, 4, 5, 4)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_tokens_may_come_before_heads(backend: str) -> None:
    given, limits = good(), {"causal": "token", "window": 3, "attn_mask": mask(2, 1, 1, 7)}
    expected = interleaved_head_attention(**given, **limits, backend=backend)
    turned = {**given, **{name: given[name].transpose(1, 2) for name in NAMES[:3]}}
    output = interleaved_head_attention(**turned, **limits, layout="bshd", backend=backend)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    assert explain_backend(**turned, layout="bshd").chosen == explain_backend(**given).chosen


def test_a_mask_of_two_dimensions_holds_for_every_sequence_and_head() -> None:
    given, tokens = good(), torch.rand(5, 7) < 0.6
    expected = interleaved_head_attention(**given, attn_mask=tokens[None, None])
    torch.testing.assert_close(interleaved_head_attention(**given, attn_mask=tokens), expected)
    assert not torch.allclose(interleaved_head_attention(**given), expected)


@pytest.mark.parametrize("causal", ["flat", "token", None])
def test_is_causal_agrees_and_changes_nothing(causal: Any) -> None:
    given = good()
    expected = interleaved_head_attention(**given, causal=causal)
    output = interleaved_head_attention(**given, causal=causal, is_causal=causal is not None)
    assert torch.equal(output, expected)


def test_explain_backend_refuses_what_the_operator_refuses() -> None:
    with pytest.raises(ValueError, match=r"^window must be at least 1, got 0"):
        explain_backend(**good(), window=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "local", "streamed:sdpa"])
def test_mixing_tensors_of_another_dtype_are_cast(backend: str, dtype: torch.dtype) -> None:
    given = good(dtype=torch.float32)
    rounded = {n: t if n in NAMES[:3] else t.to(dtype) for n, t in given.items()}
    cast = {n: t.to(torch.float32) for n, t in rounded.items()}
    output = interleaved_head_attention(**rounded, window=3, backend=backend)
    expected = interleaved_head_attention(**cast, window=3, backend=backend)
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "local", "streamed:sdpa"])
def test_the_output_has_the_dtype_of_query(backend: str, dtype: torch.dtype) -> None:
    given = {n: t.to(dtype) if n in NAMES[:3] else t.float() for n, t in good().items()}
    assert interleaved_head_attention(**given, window=3, backend=backend).dtype == dtype


@pytest.mark.parametrize("backend", ["reference", "sdpa", "streamed:sdpa"])
def test_fewer_keys_than_queries_are_cross_attention(backend: str) -> None:
    """Every query sees every key, so a query more or less changes nothing for the others."""
    given = good(N=5, S=3)
    output = interleaved_head_attention(**given, causal=None, backend=backend)
    fewer = {**given, "query": given["query"][:, :, :2]}
    part = interleaved_head_attention(**fewer, causal=None, backend=backend)
    torch.testing.assert_close(output[:, :, :2], part)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "local", "streamed:sdpa"])
def test_an_empty_batch_gives_an_empty_output(backend: str) -> None:
    assert interleaved_head_attention(**good(B=0), window=3, backend=backend).shape == (0, 4, 5, 4)


@pytest.mark.parametrize("offset", [torch.tensor(1), torch.tensor([1]), torch.tensor([[1]]).int()])
def test_an_offset_may_be_any_integer_tensor_with_one_element(offset: Tensor) -> None:
    output = interleaved_head_attention(**good(), query_offset=offset)
    expected = interleaved_head_attention(**good(), query_offset=1)
    torch.testing.assert_close(output, expected)
    assert not torch.allclose(output, interleaved_head_attention(**good(), query_offset=2))


def test_a_window_as_long_as_the_sequence_is_no_window() -> None:
    assert explain_backend(**good(N=7), window=6).chosen == "local"
    assert explain_backend(**good(N=7), window=7).chosen == "sdpa"


def test_sizes_and_numbers_may_be_symbolic() -> None:
    compiled = torch.compile(
        interleaved_head_attention, fullgraph=True, dynamic=True, backend="eager"
    )
    for N, offset in ((5, 0), (6, 1), (8, 3)):
        given = good(N=N, S=N + 4)
        output = compiled(**given, query_offset=offset, backend="sdpa")
        expected = interleaved_head_attention(**given, query_offset=offset, backend="reference")
        torch.testing.assert_close(output, expected)
