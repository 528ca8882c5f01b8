"""Stand-ins for the FlashAttention packages: their signatures, and their semantics in plain torch.

The signatures are those of Dao-AILab/flash-attention: flash_attn/flash_attn_interface.py (2),
hopper/flash_attn_interface.py (3) and flash_attn/cute/interface.py (4). A keyword that the real
function does not have is a TypeError here too.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import dropout

from iha.backends import flash

NAMES = tuple(package.name for package in flash.PACKAGES)


def pretend(
    monkeypatch: pytest.MonkeyPatch, *installed: str, major: int = 9, on_cuda: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Install stand-ins, those packages only, for a GPU of that generation.

    Any tensor passes for one on it, unless the test has tensors that say so themselves.

    Returns, by package, the keywords that its functions are called with.
    """
    monkeypatch.setattr(flash, "major", lambda call: major)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    if not on_cuda:
        monkeypatch.setattr(flash, "unfit_tensors", lambda call: None)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    makers = dict(zip(NAMES, (version_4, version_3, version_2), strict=True))
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in installed}
    for name in NAMES:
        module = makers[name](seen[name]) if name in installed else None
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    monkeypatch.setattr(flash, "imported", inspect.unwrap(flash.imported))  # uncached
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: tuple[int | None, int | None],
    softcap: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Layout (batch, tokens, heads, d); positions counted from the end, as the documentation says:

    query i attends to keys from i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right.
    """
    left, right = window
    if causal:
        right = 0
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(k.shape[1]) - (torch.arange(q.shape[1]) + k.shape[1] - q.shape[1])[:, None]
    if left is not None:
        scores = scores.masked_fill(ahead < -left, -torch.inf)
    if right is not None:
        scores = scores.masked_fill(ahead > right, -torch.inf)
    weights = dropout(scores.softmax(-1).nan_to_num(), dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def packed(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int | None, *options: Any
) -> Tensor:
    """Layout (total tokens, heads, d), each sequence on its own."""
    assert bounds.dtype == torch.int32
    assert bounds[0] == 0
    assert bounds[-1] == len(q) == len(k) == len(v)
    assert longest == int(bounds.diff().max())
    ends = bounds.tolist()
    cut = ([t[None, a:b] for t in (q, k, v)] for a, b in itertools.pairwise(ends))
    return torch.cat([attention(*part, *options)[0] for part in cut])


def infinite(window: tuple[int, int]) -> tuple[int | None, int | None]:
    """The window of versions 2 and 3, where -1 is no limit."""
    left, right = (None if size == -1 else size for size in window)
    assert left is None or left >= 0
    assert right is None or right >= 0
    return left, right


def version_2(seen: list[dict[str, Any]]) -> ModuleType:
    module: Any = ModuleType("flash_attn")

    def flash_attn_func(
        q: Any, k: Any, v: Any, dropout_p: Any = 0.0, softmax_scale: Any = None,
        causal: Any = False, window_size: Any = (-1, -1), softcap: Any = 0.0,
        alibi_slopes: Any = None, deterministic: Any = False, return_attn_probs: Any = False,
    ) -> Tensor:  # fmt: skip
        seen.append({"window_size": window_size, "dropout_p": dropout_p, "causal": causal})
        window = infinite(window_size)
        return attention(q, k, v, softmax_scale, causal, window, softcap, dropout_p)

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any,
        max_seqlen_k: Any, dropout_p: Any = 0.0, softmax_scale: Any = None, causal: Any = False,
        window_size: Any = (-1, -1), softcap: Any = 0.0, alibi_slopes: Any = None,
        deterministic: Any = False, return_attn_probs: Any = False, block_table: Any = None,
    ) -> Tensor:  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k
        seen.append({"window_size": window_size, "dropout_p": dropout_p, "causal": causal})
        options = (softmax_scale, causal, infinite(window_size), softcap, dropout_p)
        return packed(q, k, v, cu_seqlens_q, max_seqlen_q, *options)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


def version_3(seen: list[dict[str, Any]]) -> ModuleType:
    module: Any = ModuleType("flash_attn_interface")

    def flash_attn_func(
        q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: Any = False, qv: Any = None,
        q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
        window_size: Any = (-1, -1), attention_chunk: Any = 0, softcap: Any = 0.0,
        num_splits: Any = 1, pack_gqa: Any = None, deterministic: Any = False, sm_margin: Any = 0,
        return_attn_probs: Any = False,
    ) -> Tensor:  # fmt: skip
        seen.append({"window_size": window_size, "causal": causal})
        return attention(q, k, v, softmax_scale, causal, infinite(window_size), softcap)

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any,
        max_seqlen_k: Any, seqused_q: Any = None, seqused_k: Any = None, softmax_scale: Any = None,
        causal: Any = False, qv: Any = None, q_descale: Any = None, k_descale: Any = None,
        v_descale: Any = None, window_size: Any = (-1, -1), attention_chunk: Any = 0,
        softcap: Any = 0.0, num_splits: Any = 1, pack_gqa: Any = None, deterministic: Any = False,
        sm_margin: Any = 0, return_attn_probs: Any = False,
    ) -> Tensor:  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k
        seen.append({"window_size": window_size, "causal": causal})
        options = (softmax_scale, causal, infinite(window_size), softcap)
        return packed(q, k, v, cu_seqlens_q, max_seqlen_q, *options)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


def version_4(seen: list[dict[str, Any]]) -> ModuleType:
    """Its window has None for no limit, and it returns (out, lse or None)."""
    module: Any = ModuleType("flash_attn.cute")

    def flash_attn_func(
        q: Any, k: Any, v: Any, qv: Any = None, gather_kv_indices: Any = None,
        softmax_scale: Any = None, causal: Any = False, window_size: Any = (None, None),
        learnable_sink: Any = None, softcap: Any = 0.0, num_splits: Any = 1, pack_gqa: Any = None,
        deterministic: Any = False, score_mod: Any = None, score_mod_bwd: Any = None,
        mask_mod: Any = None, aux_tensors: Any = None, aux_scalars: Any = None,
        block_sparse_tensors: Any = None, block_sparse_tensors_bwd: Any = None,
        return_lse: Any = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        seen.append({"window_size": window_size, "causal": causal})
        assert all(size is None or size >= 0 for size in window_size)
        return attention(q, k, v, softmax_scale, causal, window_size, softcap), None

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, qv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
        max_seqlen_q: Any = None, max_seqlen_k: Any = None, min_seqlen_k: Any = None,
        seqused_q: Any = None, seqused_k: Any = None, gather_kv_indices: Any = None,
        page_table: Any = None, softmax_scale: Any = None, causal: Any = False,
        window_size: Any = (None, None), learnable_sink: Any = None, softcap: Any = 0.0,
        num_splits: Any = 1, pack_gqa: Any = None, deterministic: Any = False,
        score_mod: Any = None, score_mod_bwd: Any = None, mask_mod: Any = None,
        block_sparse_tensors: Any = None, aux_tensors: Any = None, aux_scalars: Any = None,
        return_lse: Any = False, scheduler_metadata: Any = None, seqlen_k_per_split: Any = None,
        disable_scheduler_metadata: Any = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k
        assert all(size is None or size >= 0 for size in window_size)
        seen.append({"window_size": window_size, "causal": causal})
        options = (softmax_scale, causal, window_size, softcap)
        return packed(q, k, v, cu_seqlens_q, max_seqlen_q, *options), None

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module
