"""Run what the library does with every annotation checked: shapes and dtypes by jaxtyping.

A program of its own (`python -m tests.shapes`), since `iha` imports jaxtyping for type checkers
only, and since a checked function cannot be compiled.
"""

from __future__ import annotations

import inspect
import typing
from typing import Any

import beartype  # noqa: F401  # before what it checks
import pytest
import torch
import transformers.models.auto.modeling_auto  # what iha imports, so that only iha
import transformers.models.llama.modeling_llama  # noqa: F401  # sees what type checkers see
from hypothesis import given, settings
from jaxtyping import TypeCheckError, install_import_hook
from transformers import ContinuousBatchingConfig, GenerationConfig

if __name__ == "__main__":
    # An int where a float is asked for is right, as for type checkers.
    checker = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    install_import_hook("iha", checker)
    infer_schema = torch.library.infer_schema  # of custom ops, whose annotations it reads
    torch.library.infer_schema = lambda f, **options: infer_schema(inspect.unwrap(f), **options)
    typing.TYPE_CHECKING = True
    import iha.hf

    typing.TYPE_CHECKING = False

import iha
import iha.mixing
from tests.arguments import arguments, tensors
from tests.backends.flash_packages import NAMES, pretend
from tests.hf.families import inputs, trained

BACKENDS = ("reference", "sdpa", "chunked", "local", "streamed:sdpa", "streamed:local")


@settings(max_examples=20, deadline=None, report_multiple_bugs=False)
@given(given=arguments(dtype=torch.float32))
def the_operator(given: dict[str, Any]) -> None:
    for backend in BACKENDS:
        if "local" not in backend or given.get("window", 10**9) < given["key"].shape[2]:
            leaves = {n: t.requires_grad_() if n == "query" else t for n, t in given.items()}
            iha.interleaved_head_attention(**leaves, backend=backend).sum().backward()


def flash_attention() -> None:
    """Through stand-ins for its packages."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [5, 2, 2, 2, 2, 2, 2]])
    for package in NAMES:
        with pytest.MonkeyPatch.context() as patch:
            pretend(patch, package)
            for options in ({"window": 3}, {"document_ids": documents}):
                iha.interleaved_head_attention(**tensors(G=2, d=8), **options, backend="flash")


def the_layer() -> None:
    for options in ({}, {"rope": "fractional", "num_kv_heads": 2}, {"per_head_collapse": True}):
        layer = iha.InterleavedHeadAttention(
            16, 4, pseudo_heads=3, pseudo_queries=2, init="scratch", **options
        )
        for capacity in (None, 8):
            cache = iha.KeyValueCache(capacity)
            with torch.no_grad():
                for tokens in torch.randn(2, 7, 16).split((4, 1, 2), dim=1):
                    layer(tokens, cache=cache)
    crossing = iha.InterleavedHeadAttention(
        16, 4, pseudo_heads=2, causal=None, rope=None, context_dim=6, init="scratch"
    )
    crossing(torch.randn(2, 7, 16), torch.randn(2, 3, 6))


def upcycled_models() -> None:
    for family in ("llama", "mistral", "gemma2", "bert", "bart"):
        model = trained(family)
        model(**inputs(family))
    for rope in ("virtual", "fractional"):
        model = trained("llama", pseudo_queries=1, rope=rope)
        ids = inputs("llama")
        model.generate(**ids, max_new_tokens=3, do_sample=False)
        model.generate(**ids, max_new_tokens=3, cache_implementation="static")
    model(input_ids=ids["input_ids"][:1], position_ids=(torch.arange(11) % 5)[None])
    for pattern in iha.attention_patterns(model, ids, layers=[0], heads=[1]).values():
        assert pattern.pairs.sum((3, 4, 5)).shape == pattern.tokens.shape[:3]
    model.generate_batch(
        [[3, 4, 5], [6]],
        generation_config=GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=16),
        progress_bar=False,
    )


def the_checks_themselves() -> None:
    with pytest.raises(TypeCheckError, match="alpha"):
        iha.mixing.mix(torch.ones(1, 2, 3, 4), torch.ones(3, 3, 2))


if __name__ == "__main__":
    the_checks_themselves()
    the_operator()
    flash_attention()
    the_layer()
    upcycled_models()
