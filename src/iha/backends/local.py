"""Window layers in O(N·W): block by block, on any device, without an N·P x N·P mask.

A block of T query tokens sees at most T + W key tokens. Each token is mixed once, tokens-major, and
the blocks are overlapping runs of the pseudo tensors: strided views where B = 1. Which pairs are
visible comes from index arithmetic. (In a graph, runs of base tokens are gathered, then mixed.)

A run of blocks is a call like any other, on fewer tokens. So `run` cuts a long call into chunks
whose pseudo tensors stay in a processor's cache, and what is alive at any time is one chunk of
them: of all but a few, autograd keeps the base tensors, and the backward pass computes them again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad

from iha.backends import alternatives, sdpa
from iha.call import Call, Refusal
from iha.checks import known
from iha.mixing import collapse_tokens, paired, pseudo_tokens
from iha.visibility import reach, visible_pairs

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

NAME = "local"

# Bytes of one chunk's pseudo tensors. On a CPU they are to stay in the cache that a core has for
# itself and its share of the next. Elsewhere a chunk costs kernel launches and gains no cache,
# so it is as large as memory easily bears.
CHUNK_BYTES = {"cpu": 8 * 2**20}
OTHER_CHUNK_BYTES = 2**30
# So many chunks autograd may keep: less time than computing them again, while a longer call would
# take P times the memory of its base tensors.
KEPT_CHUNKS = 8

BASE = ("query", "key", "value")
TENSORS = (*BASE, "alpha_q", "alpha_k", "alpha_v", "collapse")


def refusal(call: Call) -> Refusal | None:
    if call.window is None:
        return lambda: (
            f"there is no window shorter than the sequence; {alternatives.instead(call)} can do it"
        )
    return None


def run(call: Call) -> Tensor:
    # A compiler would write the loop out, one copy of its body for each chunk.
    if torch.compiler.is_compiling():
        return _attend(call)
    if isinstance(call.query_offset, Tensor) and call.query_offset.device.type == "cpu":
        call = call.replace(query_offset=int(call.query_offset))  # nobody waits for it here
    pieces = _pieces(call)
    if len(pieces) == 1 or (call.requires_grad and len(pieces) <= KEPT_CHUNKS):
        return _attend(call)
    if not call.requires_grad:
        return _in_turn(call, pieces)
    return _Chunked.apply(call, pieces, *(getattr(call, name) for name in TENSORS))  # pyright: ignore[reportReturnType]


def block_size(call: Call) -> int:
    """T tokens, at most N: a part of a window, but at least 64 rows of virtual tokens.

    Of T + W tokens that are computed with, W are wanted. On a CPU the products are what costs, so T
    is half a window; elsewhere it is the memory that the runs of pseudo-keys take, so T is a whole
    one.
    """
    assert call.window is not None
    part = -(-call.window // 2) if call.query.device.type == "cpu" else call.window
    size = max(part, -(-64 // call.pseudo_heads))
    # A graph is one for all lengths, and does not ask whether N is less.
    return size if torch.compiler.is_compiling() else min(size, call.query.shape[2])


# --- chunks ---

Piece = tuple[slice, slice, slice]  # of the batch, of the query tokens, of the key tokens


def _pieces(call: Call) -> list[Piece]:
    """Whole blocks, as many as fit: of one sequence, or of several where they are short."""
    (B, _, N, d), S = call.query.shape, call.key.shape[2]
    T, (back, ahead) = block_size(call), reach(call)
    rows = call.alpha_q.shape[1] * T + 2 * call.alpha_k.shape[1] * (back + T + ahead)
    block_bytes = rows * call.pseudo_heads * d * call.query.element_size()
    blocks = -(-N // T)
    chunk_bytes = CHUNK_BYTES.get(call.query.device.type, OTHER_CHUNK_BYTES)
    fit = max(1, chunk_bytes // block_bytes)
    if fit >= B * blocks or _indivisible(call):
        return [(slice(0, B), slice(0, N), slice(0, S))]
    sequences, step = max(1, fit // blocks), T * min(fit, blocks)
    found: list[Piece] = []
    for b in range(0, B, sequences):
        for n in range(0, N, step):
            end = min(n + step, N)
            first, last = call.query_offset + n - back, call.query_offset + end + ahead
            found.append(
                (slice(b, b + sequences), slice(n, end), slice(max(first, 0), min(last, S)))
            )
    return found


def _indivisible(call: Call) -> bool:
    """Whether `_Chunked` has no means to cut `call` up, or to compute it again."""
    on_device = call.query.device.type != "cpu"
    learned = call.phase is not None and any(table.requires_grad for table in call.phase)
    # The offset is not known here, or another generator than the CPU's would have to be replayed.
    return learned or (on_device and (isinstance(call.query_offset, Tensor) or call.dropout_p > 0))


def _chunk(call: Call, piece: Piece) -> Call:
    """The call that `piece` of `call` is."""
    b, n, s = piece
    mask, ids = call.attn_mask, call.document_ids
    if mask is not None:
        # A dimension of size 1 holds for all.
        kept = (b, slice(None), n, s)
        mask = mask[
            tuple(k if m > 1 else slice(None) for k, m in zip(kept, mask.shape, strict=True))
        ]
    return call.replace(
        query=call.query[b, :, n],
        key=call.key[b, :, s],
        value=call.value[b, :, s],
        attn_mask=mask,
        document_ids=None if ids is None else ids[b, s],
        query_offset=call.query_offset + n.start - s.start,
    )


def _in_turn(call: Call, pieces: list[Piece]) -> Tensor:
    B, _, N, d = call.query.shape
    output = call.query.new_empty(B, call.collapse.shape[0], N, d)
    for piece in pieces:
        output[piece[0], :, piece[1]] = _attend(_chunk(call, piece))
    return output


class _Chunked(torch.autograd.Function):
    """All chunks of a call, one after the other; the backward pass computes each again."""

    @staticmethod
    def forward(ctx: Any, call: Call, pieces: list[Piece], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        # Without the tensors: what autograd saves it can also let go of.
        ctx.call, ctx.pieces = call.replace(**dict.fromkeys(TENSORS)), pieces
        ctx.random = torch.get_rng_state() if call.dropout_p > 0 else None
        return _in_turn(call, pieces)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        call = ctx.call.replace(**dict(zip(TENSORS, ctx.saved_tensors, strict=True)))
        # Few numbers, each a sum over all chunks: float32 where the tensors have less.
        totals = [
            torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32))
            for t in ctx.saved_tensors
        ]
        with _replayed(ctx.random):
            for piece in ctx.pieces:
                b, n, s = piece
                chunk = _chunk(call, piece)
                leaves = [getattr(chunk, name).detach().requires_grad_() for name in TENSORS]
                with torch.enable_grad():
                    output = _attend(chunk.replace(**dict(zip(TENSORS, leaves, strict=True))))
                parts = [totals[0][b, :, n], totals[1][b, :, s], totals[2][b, :, s], *totals[3:]]
                found = torch.autograd.grad(output, leaves, grad[b, :, n])
                for part, gradient in zip(parts, found, strict=True):
                    part += gradient
        found = zip(totals, ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(total.to(t.dtype) if needed else None for total, t, needed in found)


@contextlib.contextmanager
def _replayed(state: Tensor | None) -> Generator[None]:
    """Draw again what was drawn from `state` on, and leave the generator as it was."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([]):
        torch.set_rng_state(state)
        yield


# --- one chunk ---


def _attend(call: Call) -> Tensor:
    """All blocks of `call` as one batch."""
    B, _, N, _ = call.query.shape
    Pq, T = call.pseudo_queries, block_size(call)
    back, ahead = reach(call)
    blocks, seen = -(-N // T), back + T + ahead
    if not (known(blocks > 1) or known(blocks == 1)):
        # One to spare: PyTorch asks of each size whether it is 1. And as one quotient, since it
        # divides products of sizes by each other, which it cannot do with sums.
        blocks = (N + 2 * T - 1) // T

    # Whole steps, so that gradients of the runs add up to a tensor that need not be cut.
    first, count = call.query_offset - back, (blocks - 1 + -(-seen // T)) * T
    unmasked = paired(call.replace(attn_mask=None, document_ids=None))  # these are of S tokens
    if torch.compiler.is_compiling():
        parts = ((call.query, 0, T), (call.key, first, seen), (call.value, first, seen))
        query, key, value = (_gathered(t, start, blocks, size, T) for t, start, size in parts)
        pseudo = pseudo_tokens(unmasked.replace(query=query, key=key, value=value))
        query, key, value = (
            t.view(B * blocks, size * t.shape[2], *t.shape[3:]).transpose(1, 2)
            for t, (_, _, size) in zip(pseudo, parts, strict=True)
        )
    else:
        query, key, value = pseudo_tokens(
            unmasked.replace(
                query=pad(unmasked.query, (0, 0, 0, blocks * T - N)),
                key=_tokens(unmasked.key, first, count),
                value=_tokens(call.value, first, count),
            )
        )
        query = query.view(B * blocks, T * Pq, *query.shape[3:]).transpose(1, 2)
        key, value = (_runs(t, seen, T).flatten(1, 2).transpose(1, 2) for t in (key, value))

    attention = sdpa.attend if call.softcap is None else _softcapped
    out = attention(call, query, key, value, _block_mask(call, T, back, seen, blocks))
    if torch.compiler.is_compiling():
        pseudo = out.transpose(1, 2).unflatten(1, (T, Pq))
        n = torch.arange(N, device=out.device)
        run = torch.arange(B, device=out.device)[:, None] * blocks + n // T
        return collapse_tokens(pseudo[run, n % T], call.collapse)
    pseudo = out.transpose(1, 2).reshape(B, blocks * T, Pq, out.shape[1], out.shape[3])
    return collapse_tokens(pseudo[:, :N], call.collapse)


def _tokens(
    base: Float[Tensor, "B G S d"], first: int | Int[Tensor, ""], count: int
) -> Float[Tensor, "B G count d"]:
    """Tokens first … first + count - 1; those outside of 0 … S-1 hold anything, and are masked."""
    S = base.shape[2]
    if isinstance(first, Tensor):
        positions = torch.arange(count, device=base.device) + first
        return base.index_select(2, positions.clamp(0, S - 1))
    start, stop = max(first, 0), min(first + count, S)
    return pad(base[:, :, start:stop], (0, 0, start - first, first + count - stop))


def _runs(
    tokens: Float[Tensor, "B M P h d"], size: int, step: int
) -> Float[Tensor, "runs size P h d"]:
    """Overlapping runs of `size` tokens, `step` apart; a view where B = 1."""
    return _Runs.apply(tokens, size, step)  # pyright: ignore[reportReturnType]


def _cut(tokens: Tensor, size: int, step: int) -> Tensor:
    token = math.prod(tokens.shape[2:])
    runs = tokens.flatten(1).unfold(1, size * token, step * token).flatten(0, 1)
    return runs.unflatten(1, (size, *tokens.shape[2:]))


class _Runs(torch.autograd.Function):
    """`_cut`, and backwards a few large sums in place of one number after the other."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, size: int, step: int) -> Tensor:
        ctx.shape, ctx.size, ctx.step = tokens.shape, size, step
        return _cut(tokens, size, step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (B, _, *rest), size, step = ctx.shape, ctx.size, ctx.step
        runs = grads[0].unflatten(0, (B, -1))
        blocks = runs.shape[1]
        parts = -(-size // step)
        total = runs.new_empty(B, blocks + parts - 1, step, *rest)
        total[:, :blocks], total[:, blocks:] = runs[:, :, :step], 0
        for part in range(1, parts):
            piece = runs[:, :, part * step : (part + 1) * step]
            total[:, part : part + blocks, : piece.shape[2]] += piece
        return total.flatten(1, 2), None, None


def _gathered(
    base: Float[Tensor, "B h M d"],
    first: int | Int[Tensor, ""],
    blocks: int,
    size: int,
    step: int,
) -> Float[Tensor, "runs_size h 1 d"]:
    """The tokens of the same runs, from token `first` on, by index, each an element of the batch.

    So a graph of any length compares no sizes: to fold runs and tokens into one batch would.
    Indices beyond the ends are moved to them, and masked.
    """
    index = torch.arange(base.shape[0] * blocks * size, device=base.device)
    run = index // size
    positions = run % blocks * step + index % size + first
    return base[run // blocks, :, positions.clamp(0, base.shape[2] - 1)][:, :, None]


def _block_mask(
    call: Call, T: int, back: int, seen: int, blocks: int
) -> Bool[Tensor, "#runs #H TPq seenP"]:
    """Visibility within each block: by position, by the ends of the sequence, by token masks."""
    S, offset = call.key.shape[2], call.query_offset
    pairs = _pairs(call, T, back, seen)
    masked = call.attn_mask is not None or call.document_ids is not None
    inside = not isinstance(offset, Tensor) and (
        known(offset >= back) and known(offset - back + (blocks - 1) * T + seen <= S)
    )
    if inside and not masked:
        return pairs.flatten(2, 3).flatten(0, 1)[None, None]
    device = call.query.device
    start = torch.arange(blocks, device=device)[:, None] * T
    n = start + torch.arange(T, device=device)  # token of the query tensor
    s = start + torch.arange(seen, device=device) - back + offset
    tokens = _token_pairs(call, n, s)
    # To P columns each first: rows of seen·P entries, not of P, then meet those of `pairs`.
    tokens = tokens[..., None].expand(*tokens.shape, call.pseudo_heads).flatten(3)
    return (tokens[:, :, :, None] & pairs.flatten(2)).flatten(2, 3)


def _pairs(call: Call, T: int, back: int, seen: int) -> Bool[Tensor, "T Pq seen P"]:
    """Visibility by position: the same in every block."""
    device = call.query.device
    return visible_pairs(
        torch.arange(T, device=device)[:, None, None, None],
        call.query_indices()[:, None, None],
        torch.arange(seen, device=device)[:, None] - back,
        torch.arange(call.pseudo_heads, device=device),
        causal=call.causal,
        window=call.window,
        pseudo_heads=call.pseudo_heads,
    )


def _token_pairs(
    call: Call, n: Int[Tensor, "blocks T"], s: Int[Tensor, "blocks seen"]
) -> Bool[Tensor, "#runs #H T seen"]:
    """Whether key token s of a block exists, and the masks let query token n see it."""
    (B, _, N, _), S, blocks = call.query.shape, call.key.shape[2], s.shape[0]
    run = torch.arange(B * blocks, device=s.device)
    b, n, s = run // blocks, n[run % blocks], s[run % blocks]
    # Queries behind the last, which fill their block up, see what is no token: never nothing.
    visible = (((s >= 0) & (s < S))[:, None] | (n >= N)[..., None])[:, None]
    n, s = n.clamp(max=N - 1), s.clamp(0, S - 1)
    if call.attn_mask is not None:
        mask = call.attn_mask.expand(B, -1, N, S)
        visible = visible & mask[b[:, None, None], :, n[:, :, None], s[:, None]].movedim(3, 1)
    if call.document_ids is not None:
        ids, b = call.document_ids, b[:, None]
        same = ids[b, n + call.query_offset][:, :, None] == ids[b, s][:, None]
        visible = visible & same[:, None]
    return visible


def _softcapped(
    call: Call,
    query: Float[Tensor, "blocks h rows d"],
    key: Float[Tensor, "blocks g columns d"],
    value: Float[Tensor, "blocks g columns d"],
    mask: Bool[Tensor, "#blocks #h rows columns"],
) -> Float[Tensor, "blocks h rows d"]:
    """What SDPA would do if it had a soft-cap. Blocks are small enough to write their scores."""
    assert call.softcap is not None
    exact = torch.promote_types(query.dtype, torch.float32)  # a score may be more than 65504
    key, value = (t.repeat_interleave(call.heads_per_kv, dim=1) for t in (key, value))
    with call.without_autocast():
        scores = call.scale * (query.to(exact) @ key.to(exact).mT)
        scores = call.softcap * torch.tanh(scores / call.softcap)
        weights = scores.masked_fill(~mask, torch.finfo(exact).min).softmax(-1) * mask
        return dropout(weights, call.dropout_p).to(value.dtype) @ value
