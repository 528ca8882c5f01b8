"""Grids and arguments: from a checked call to kernels."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from iha.call import Call
from iha.kernels import backward, configs, decode, forward
from iha.kernels.layout import Heads, Inputs, Spec, power_of_two
from iha.mixing import collapse_heads

SideName = Literal["queries", "keys"]
INTERPRETED_PROGRAMS = 3  # few and odd, so that tests see programs with several tiles


def run_forward(call: Call) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, d), and log2 of the softmax's denominators (B, H·Pq, N)."""
    launch, (B, H, N, _) = _Launch(call), call.query.shape
    output = torch.empty_like(call.query, memory_format=torch.contiguous_format)
    log_sum = launch.empty(B, H * call.pseudo_queries, N)
    launch("forward", "queries", forward.forward_kernel, heads(output), log_sum, scratch=True)
    return output, log_sum


def run_backward(call: Call, gradient: Tensor, log_sum: Tensor) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, α^Q, α^K, α^V and R."""
    launch = _Launch(call)
    base = (call.query, call.key, call.value)
    of_base = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in base]
    of_query, of_key, of_value = map(heads, of_base)
    known = (heads(gradient), log_sum)
    # The first one also writes what the next two read, Σ_d dÕ·Õ.
    given = (*known, torch.empty_like(log_sum))
    of_collapse = launch.gradient(
        "output", "queries", backward.backward_output_kernel, *given, scratch=False
    )
    of_alpha_q = launch.gradient(
        "query", "queries", backward.backward_query_kernel, *given, of_query
    )
    of_alpha_k = launch.gradient("key", "keys", backward.backward_key_kernel, *given, of_key)
    of_alpha_v = launch.gradient("value", "keys", backward.backward_value_kernel, *known, of_value)
    found = (of_alpha_q, of_alpha_k, of_alpha_v, of_collapse)
    mixing = (call.alpha_q, call.alpha_k, call.alpha_v, call.collapse)
    return *of_base, *(total.to(t.dtype) for total, t in zip(found, mixing, strict=True))


class Pages(NamedTuple):
    """Where the tokens of each sequence lie in a paged cache; both on the cache's device."""

    table: Tensor  # (B, most pages) int32: the block of tokens i·page … of a sequence
    lengths: Tensor  # (B,) int32: its tokens, queries included


def run_decode(call: Call, pages: Pages | None = None) -> Tensor:
    """Outputs (B, H, N, d) for a few queries against a long cache; no gradients.

    With `pages`, the keys and values of `call` are (blocks, G, page, d), and the queries of each
    sequence are the last N of its tokens.
    """
    launch = _Launch(call)
    (B, H, N, d), S, Pq = call.query.shape, call.key.shape[2], call.pseudo_queries
    found = configs.config("decode", launch.shape)
    spec, inputs = launch.spec(found), launch.inputs
    if pages is not None:
        spec = dataclasses.replace(spec, page=S)
        inputs = inputs._replace(
            table=pages.table, table_batch=pages.table.stride(0), lengths=pages.lengths
        )
        S *= pages.table.shape[1]
    count = H * Pq * call.pseudo_heads * N
    rows = max(16, min(found.query_tile.size, power_of_two(count)))
    tokens = max(16, found.key_tile.size)
    blocks = -(-count // rows)
    seen = S if call.window is None else min(S, 2 * call.window + N)
    splits = max(1, min(-(-seen // tokens), 2 * programs(call.query.device) // (blocks * B)))
    partial, log_sum = launch.empty(B, splits, count, d), launch.empty(B, splits, count)
    of_splits: Any = decode.decode_kernel
    of_splits[(splits, blocks, B)](
        inputs, partial, log_sum, spec, rows, tokens,
        num_warps=found.warps, num_stages=found.stages,
    )  # fmt: skip
    pseudo = call.query.new_empty((B, H * Pq, N, d))
    merge: Any = decode.merge_kernel
    merge[(H * Pq, N, B)](
        partial, log_sum, pseudo, N, splits, spec, 16, power_of_two(d), num_warps=4
    )
    with torch.autocast(pseudo.device.type, enabled=False):
        return collapse_heads(pseudo.unflatten(1, (H, Pq)), call.collapse)


class _Launch:
    """What all kernels of a call share, and how one is started."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.shape = shape_of(call)
        self.inputs = _inputs(call)

    def __call__(
        self,
        name: configs.Kernel,
        owned: SideName,
        kernel: Any,
        *arguments: Any,
        scratch: bool,
    ) -> None:
        """Run `kernel` over the tokens of the side that its programs own.

        With `scratch`, each gets room for its running sums over heads.
        """
        found = configs.config(name, self.shape)
        spec, grid = self.spec(found), self.grid(name, owned)
        if scratch:
            side = getattr(spec, owned)
            arguments += (self.empty(grid, side.heads, 2 * side.tokens * spec.columns),)
        kernel[(grid,)](
            self.inputs, *arguments, spec, num_warps=found.warps, num_stages=found.stages
        )

    def gradient(
        self,
        name: configs.Kernel,
        owned: SideName,
        kernel: Any,
        *arguments: Any,
        scratch: bool = True,
    ) -> Tensor:
        """Run a kernel that gives a mixing tensor's gradient, a share from each program."""
        alpha = self.call.alpha_q if owned == "queries" else self.call.alpha_k
        shares = self.empty(self.grid(name, owned), *alpha.shape).zero_()
        self(name, owned, kernel, *arguments, shares, scratch=scratch)
        return shares.sum(0)

    def grid(self, name: configs.Kernel, owned: SideName) -> int:
        """Programs: one for each tile of tokens, but no more than run at once."""
        found = configs.config(name, self.shape)
        if owned == "queries":
            base, tile = self.call.query, found.query_tile
        else:
            base, tile = self.call.key, found.key_tile
        tiles = base.shape[0] * -(-base.shape[2] // tile.tokens)
        return min(tiles, programs(base.device))

    def empty(self, *shape: int) -> Tensor:
        return self.call.query.new_empty(shape, dtype=torch.float32)

    def spec(self, found: configs.Config) -> Spec:
        call = self.call
        return Spec(
            heads=call.query.shape[1],
            kv_heads=call.key.shape[1],
            pseudo_heads=call.pseudo_heads,
            pseudo_queries=call.pseudo_queries,
            width=call.query.shape[3],
            causal=call.causal,
            window=call.window,
            softcap=call.softcap,
            masked=call.attn_mask is not None,
            documents=call.document_ids is not None,
            offset_read=isinstance(call.query_offset, Tensor),
            rotated=0 if call.phase is None else call.phase[0].shape[1],
            pairs=call.phase is not None and call.rotary == "pairs",
            precision=_precision(),
            query_tile=found.query_tile,
            key_tile=found.key_tile,
        )


def heads(tensor: Tensor) -> Heads:
    batch, head, token, _ = tensor.stride()
    return Heads(tensor, batch, head, token)


@functools.cache
def programs(device: torch.device) -> int:
    """How many programs run at once: a kernel fills a multiprocessor's registers."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _precision() -> str:
    """Of products of float32: as PyTorch's own."""
    matmul: Any = torch.backends.cuda.matmul
    chosen = getattr(matmul, "fp32_precision", None)  # before PyTorch 2.9: allow_tf32
    tf32 = matmul.allow_tf32 if chosen is None else chosen == "tf32"
    return "tf32" if tf32 else "ieee"


def shape_of(call: Call) -> configs.Shape:
    query = call.query
    shared = call.heads_per_kv * call.pseudo_queries
    sizes = (call.pseudo_heads, shared, query.shape[3], query.element_size())
    return configs.Shape(*sizes, generation(query.device))


def generation(device: torch.device) -> int:
    """9 is Hopper, 10 Blackwell. Without a GPU the tiles are a Hopper's."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _tables(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin, each (P, d/2); dimensions that the phase does not rotate stay."""
    if call.phase is None:
        return None, None
    cos, sin = call.phase
    rest = (0, call.query.shape[3] // 2 - cos.shape[1])
    return pad(cos.float(), rest, value=1.0).contiguous(), pad(sin.float(), rest).contiguous()


def _inputs(call: Call) -> Inputs:
    (B, H, N, _), S = call.query.shape, call.key.shape[2]
    mask, (batch, head, row, column) = call.attn_mask, (0, 0, 0, 0)
    if mask is not None:
        mask = mask.view(torch.int8).expand(B, H, N, S)
        batch, head, row, column = mask.stride()
    cos, sin = _tables(call)
    return Inputs(
        query=heads(call.query),
        key=heads(call.key),
        value=heads(call.value),
        alpha_q=call.alpha_q.contiguous(),
        alpha_k=call.alpha_k.contiguous(),
        alpha_v=call.alpha_v.contiguous(),
        collapse=call.collapse.contiguous(),
        cos=cos,
        sin=sin,
        offset=call.query_offset,
        mask=mask,
        mask_batch=batch,
        mask_head=head,
        mask_query=row,
        mask_key=column,
        documents=None if call.document_ids is None else call.document_ids.contiguous(),
        B=B,
        N=N,
        S=S,
        scale=call.scale,
    )
