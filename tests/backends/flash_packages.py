"""Stand-ins for the FlashAttention packages: their signatures, and their semantics in plain torch.

The signatures are those of Dao-AILab/flash-attention: flash_attn/flash_attn_interface.py (2),
hopper/flash_attn_interface.py (3) and flash_attn/cute/interface.py (4). A keyword that the real
function does not have is a TypeError here too.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Generator
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
    scores = masked_scores(q, k, scale, (window[0], 0 if causal else window[1]), softcap)
    weights = dropout(scores.softmax(-1).nan_to_num(), dropout_p)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def masked_scores(
    q: Tensor, k: Tensor, scale: float, window: tuple[int | None, int | None], softcap: float = 0.0
) -> Tensor:
    left, right = window
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(k.shape[1]) - (torch.arange(q.shape[1]) + k.shape[1] - q.shape[1])[:, None]
    if left is not None:
        scores = scores.masked_fill(ahead < -left, -torch.inf)
    if right is not None:
        scores = scores.masked_fill(ahead > right, -torch.inf)
    return scores


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int | None, int | None],
    *options: Any,
) -> Tensor:
    """Layout (total tokens, heads, d), each sequence on its own."""
    (of_query, of_key), (most_queries, most_keys) = bounds, longest
    cut = (
        cut_apart(q, of_query, most_queries),
        *(cut_apart(t, of_key, most_keys) for t in (k, v)),
    )
    return torch.cat([attention(*part, *options)[0] for part in zip(*cut, strict=True)])


def cut_apart(tokens: Tensor, bounds: Tensor, longest: int | None) -> list[Tensor]:
    assert bounds.dtype == torch.int32
    assert bounds[0] == 0
    assert bounds[-1] == len(tokens)
    assert longest == int(bounds.diff().max())
    return [tokens[None, a:b] for a, b in itertools.pairwise(bounds.tolist())]


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
        seen.append({"window_size": window_size, "dropout_p": dropout_p, "causal": causal})
        options = (softmax_scale, causal, infinite(window_size), softcap, dropout_p)
        return packed(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), *options)

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
        seen.append({"window_size": window_size, "causal": causal})
        options = (softmax_scale, causal, infinite(window_size), softcap)
        return packed(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), *options)

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
        assert all(size is None or size >= 0 for size in window_size)
        seen.append({"window_size": window_size, "causal": causal})
        options = (softmax_scale, causal, window_size, softcap)
        return packed(
            q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), *options
        ), None

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


@contextlib.contextmanager
def pytorch_s_own(seen: list[tuple[int, int]]) -> Generator[None]:
    """PyTorch's FlashAttention, which has kernels for GPUs alone, in plain torch on a CPU.

    Backward computes as the kernel does, from the output and the log-sum-exp that it is handed.
    """

    def forward(
        q: Tensor, k: Tensor, v: Tensor, cum_q: Any, cum_k: Any, max_q: int, max_k: int,
        dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: Any = None,
        window_size_left: Any = None, window_size_right: Any = None, **others: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert not any(t is not None for t in others.values())
        seen.append((window_size_left, window_size_right))
        window = infinite((window_size_left, window_size_right))
        parts = zip(cut_apart(q, cum_q, max_q), cut_apart(k, cum_k, max_k), strict=True)
        logs = [masked_scores(*part, scale, window).logsumexp(-1)[0] for part in parts]
        bounds, longest = (cum_q, cum_k), (max_q, max_k)
        output = packed(q, k, v, bounds, longest, scale, is_causal, window, 0.0)
        return output, torch.cat(logs, 1), *(torch.empty(0) for _ in range(3))

    def backward(
        g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cum_q: Any,
        cum_k: Any, max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng: Any,
        unused: Any, *, scale: Any = None, window_size_left: Any = None,
        window_size_right: Any = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert lse.is_contiguous()
        window, groups = infinite((window_size_left, window_size_right)), q.shape[1] // k.shape[1]
        found = []
        of_query = (cut_apart(t, cum_q, max_q) for t in (g, q, out, lse.T))
        of_key = (cut_apart(t, cum_k, max_k) for t in (k, v))
        for g_, q_, out_, lse_, k_, v_ in zip(*of_query, *of_key, strict=True):
            weights = (masked_scores(q_, k_, scale, window) - lse_.mT[..., None]).exp()
            change = torch.einsum("bihd,bjhd->bhij", g_, v_.repeat_interleave(groups, 2))
            change = weights * (change - (g_ * out_).sum(-1).mT[..., None]) * scale
            dq = torch.einsum("bhij,bjhd->bihd", change, k_.repeat_interleave(groups, 2))
            dk, dv = (
                torch.einsum("bhij,bihd->bjhd", a, b).unflatten(2, (-1, groups)).sum(3)
                for a, b in ((change, q_), (weights, g_))
            )
            found.append((dq[0], dk[0], dv[0]))
        return tuple(torch.cat(t) for t in zip(*found, strict=True))

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()
