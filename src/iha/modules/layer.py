"""A whole attention layer: projections, rotary positions, mixing, attention, output projection."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from iha.call import Causality, autocasts
from iha.checks import (
    FLOATS,
    check_choice,
    check_factory,
    check_flag,
    check_tensor,
    checked_number,
    checked_size,
    checked_window,
)
from iha.dispatch import check_backend
from iha.modules.cache import KeyValueCache
from iha.modules.head_mixing import HeadMixing, Init
from iha.rotary import (
    RopeMode,
    RotaryConvention,
    inverse_frequencies,
    phase_tables,
    rotary_tables,
    rotate,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class InterleavedHeadAttention(nn.Module):
    r"""An Interleaved Head Attention layer (Duvvuri et al., arXiv 2602.21371, section 3).

        Q = norm(x W_Q) turned by RoPE,   K = norm(y W_K) turned by RoPE,   V = y W_V
        out = IHA(Q, K, V; α^Q, α^K, α^V, R) W_O

    where y = x, or `context` in cross-attention, and IHA is `iha.interleaved_head_attention`: each
    head attends with P pseudo-queries over P pseudo-keys a token, mixed from all heads.

    Args:
        embed_dim: width E of input and output.
        num_heads: H. num_kv_heads: G, default H; fewer is grouped-query attention.
        pseudo_heads: P; 1 with `init="identity"` is plain attention.
        pseudo_queries: Pq, at most and by default P; see `iha.HeadMixing`.
        head_dim: d, default E / H.
        context_dim: width of `context` for cross-attention, default E.
        bias: whether the four projections have one.
        causal: "flat" (the paper's), "token", or None; see `iha.interleaved_head_attention`.
        window: W tokens, or None.
        rope: "virtual" (the paper's: pseudo-head p of token n has position n·P + p), "token" (all
            have position n), "fractional" (n + p/P), or None for no positions.
        rope_base: base of the rotary frequencies.
        rotary: "half" (Llama) or "pairs" (GPT-J).
        qk_norm: RMS-normalise each query and key head, before RoPE.
        dropout: on the attention weights, in training.
        init, per_head_collapse: how the mixing starts, see `iha.HeadMixing`: "scratch" to train
            from random weights.
        dtype: of the projections. The mixing tensors are float32 in half precision too.
        backend: as in `iha.interleaved_head_attention`.

    Raises TypeError or ValueError, with the argument's name: sizes that are no integers or do not
    fit each other, numbers out of range, an unknown name.

    >>> layer = InterleavedHeadAttention(64, 8, num_kv_heads=2, pseudo_heads=4, init="scratch")
    >>> x = torch.randn(2, 10, 64)
    >>> layer(x).shape
    torch.Size([2, 10, 64])

    Token by token, with a cache that is an ordinary one:

    >>> cache = KeyValueCache()
    >>> steps = [layer(token, cache=cache) for token in x.split(1, dim=1)]
    >>> torch.allclose(torch.cat(steps, dim=1), layer(x), atol=1e-5)
    True
    >>> cache.key.shape
    torch.Size([2, 2, 10, 8])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        pseudo_heads: int,
        pseudo_queries: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = False,
        causal: Causality | None = "flat",
        window: int | None = None,
        rope: RopeMode | None = "virtual",
        rope_base: float = 10000.0,
        rotary: RotaryConvention = "half",
        qk_norm: bool = False,
        dropout: float = 0.0,
        init: Init,
        per_head_collapse: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        E, H = checked_size("embed_dim", embed_dim), checked_size("num_heads", num_heads)
        if head_dim is None and E % H:
            raise ValueError(
                f"num_heads must divide embed_dim unless head_dim is given, got {H} and {E}."
            )
        d = E // H if head_dim is None else checked_size("head_dim", head_dim)
        check_choice("causal", causal, (*get_args(Causality), None))
        check_choice("rope", rope, (*get_args(RopeMode), None))
        check_choice("rotary", rotary, get_args(RotaryConvention))
        if rope is not None and d % 2:
            given = "" if head_dim is not None else " = embed_dim / num_heads"
            raise ValueError(f"head_dim must be even for rope={rope!r}, got {d}{given}.")
        check_factory(device, dtype)
        check_flag("bias", bias)
        check_flag("qk_norm", qk_norm)
        check_backend(backend)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_mixing = HeadMixing(
            H,
            num_kv_heads=num_kv_heads,
            pseudo_heads=pseudo_heads,
            pseudo_queries=pseudo_queries,
            init=init,
            per_head_collapse=per_head_collapse,
            device=device,
            dtype=None if dtype is None else torch.promote_types(dtype, torch.float32),
        )
        self.embed_dim, self.head_dim = E, d
        C = E if context_dim is None else checked_size("context_dim", context_dim)
        if C != E and any(setting is not None for setting in (causal, window, rope)):
            raise ValueError(
                f"context_dim = {C} is for cross-attention, which needs causal=None, window=None"
                f" and rope=None, got causal={causal!r}, window={window!r}, rope={rope!r}."
            )
        self.context_dim, self.causal, self.window = C, causal, checked_window(window)
        self.rope: RopeMode | None = rope
        self.rope_base = checked_number("rope_base", rope_base, at_least=1)
        self.rotary: RotaryConvention = rotary
        self.dropout = checked_number("dropout", dropout, at_least=0, below=1)
        self.backend = backend
        G = self.head_mixing.num_kv_heads
        self.q_proj = nn.Linear(E, H * d, bias, **factory)
        self.k_proj = nn.Linear(C, G * d, bias, **factory)
        self.v_proj = nn.Linear(C, G * d, bias, **factory)
        self.o_proj = nn.Linear(H * d, E, bias, **factory)
        self.q_norm = nn.RMSNorm(d, **factory) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(d, **factory) if qk_norm else nn.Identity()

    def reset_parameters(self) -> None:
        """Start again, in place: after `to_empty` of a layer that was built on the meta device."""
        for module in self.children():
            if not isinstance(module, nn.Identity):
                module.reset_parameters()  # type: ignore[operator]

    def forward(
        self,
        x: Float[Tensor, "B N E"],
        context: Float[Tensor, "B S C"] | None = None,
        *,
        attn_mask: Bool[Tensor, "#B #H #N #S"] | None = None,
        document_ids: Int[Tensor, "B S"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "B N E"]:
        """Attend from `x` to itself, to what `cache` holds before it, or to `context`.

        Args:
            x: the tokens that ask. With a cache, those that follow the cached ones.
            context: what cross-attention reads; needs a layer with causal, window and rope None.
            attn_mask: True = attend; S counts the cached tokens too.
            document_ids: of all S tokens; those of different documents do not see each other.
            cache: takes this call's base keys and values, and gives back all it has.
        """
        if context is not None:
            self._check_crossing(document_ids, cache)
        if cache is not None and not isinstance(cache, KeyValueCache):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"cache must be a KeyValueCache, got {type(cache).__name__}.")
        if cache is not None and (self.window or math.inf) > (cache.window or math.inf):
            raise ValueError(
                f"cache keeps a window of {cache.window} tokens, which must be at least the window"
                f" of the layer, got {self.window}."
            )
        past = 0 if cache is None else cache.length
        source = x if context is None else context
        _check_tokens("x", x, self.q_proj, self.embed_dim)
        if context is None and self.context_dim != self.embed_dim:
            raise ValueError(
                f"context must be given: this layer reads one of width {self.context_dim}."
            )
        if context is not None:
            _check_tokens("context", context, self.v_proj, self.context_dim)
        value = self._heads(self.v_proj(source))
        # Autocast computes a norm in float32.
        query = self.q_norm(self._heads(self.q_proj(x))).to(value.dtype)
        key = self.k_norm(self._heads(self.k_proj(source))).to(value.dtype)
        phase = None
        if self.rope is not None:
            stride = self.head_mixing.pseudo_heads if self.rope == "virtual" else 1
            positions = torch.arange(past, past + x.shape[1], device=x.device)
            # Not a buffer: `.to(torch.bfloat16)` would round it, and far positions with it.
            frequencies = inverse_frequencies(self.head_dim, self.rope_base, x.device)
            tables = rotary_tables(positions, frequencies, stride=stride)
            query, key = (rotate(heads, tables, self.rotary) for heads in (query, key))
            phase = phase_tables(self.head_mixing.pseudo_heads, frequencies, self.rope)
        if cache is not None:
            key, value = cache.append(key, value)
            attn_mask, document_ids = (
                _of_held(mask, key.shape[2], cache.length) for mask in (attn_mask, document_ids)
            )
        heads = self.head_mixing(
            query,
            key,
            value,
            attn_mask=attn_mask,
            causal=self.causal,
            window=self.window,
            document_ids=document_ids,
            phase=phase,
            rotary=self.rotary,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def _heads(self, projected: Float[Tensor, "B N hd"]) -> Float[Tensor, "B h N d"]:
        return projected.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def _check_crossing(self, document_ids: Tensor | None, cache: KeyValueCache | None) -> None:
        if self.causal is not None or self.window is not None or self.rope is not None:
            raise ValueError(
                "context needs a layer built with causal=None, window=None and rope=None, since"
                " positions of two sequences do not compare; this one has"
                f" causal={self.causal!r}, window={self.window!r}, rope={self.rope!r}."
            )
        if document_ids is not None:
            raise ValueError(
                "document_ids number the tokens of one sequence; with context, say what sees what"
                " in attn_mask."
            )
        if cache is not None:
            raise ValueError(
                "cache holds the tokens of x that came before; with context, which is all there"
                " from the start, leave it out."
            )

    def extra_repr(self) -> str:
        return (
            f"causal={self.causal!r}, window={self.window}, rope={self.rope!r},"
            f" backend={self.backend!r}"
        )


def _of_held(mask: Tensor | None, held: int, seen: int) -> Tensor | None:
    """Of a mask of all tokens so far, the part of those that a cache with a window still has."""
    if isinstance(mask, Tensor) and mask.shape[-1:] == (seen,):
        return mask[..., -held:]
    return mask


def _check_tokens(name: str, tokens: Tensor, projection: nn.Module, width: int) -> None:
    check_tensor(name, tokens)
    if tokens.ndim != 3 or tokens.shape[2] != width or tokens.shape[1] < 1:
        raise ValueError(
            f"{name} must have shape (batch, tokens, {width}), got {tuple(tokens.shape)}."
        )
    if tokens.dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating tensor, got {tokens.dtype}.")
    if type(projection) is not nn.Linear:
        return  # sharded, quantised or adapted: it says itself what it takes
    weight = projection.weight
    if tokens.device != weight.device:
        raise ValueError(
            f"{name} must be on the device of the layer, got {tokens.device} and {weight.device}."
        )
    if tokens.dtype != weight.dtype and not autocasts(tokens.device):
        raise TypeError(
            f"{name} must have the dtype of the layer, got {tokens.dtype} and {weight.dtype}."
        )
