"""The operator: its name fixes what is computed, `backend` only how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from iha.call import Causality, Layout
from iha.checks import checked_call
from iha.dispatch import choose
from iha.rotary import Phase, RotaryConvention

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def interleaved_head_attention(
    query: Float[Tensor, "B H N d"],
    key: Float[Tensor, "B G S d"],
    value: Float[Tensor, "B G S d"],
    alpha_q: Float[Tensor, "H H Pq"],
    alpha_k: Float[Tensor, "G G P"],
    alpha_v: Float[Tensor, "G G P"],
    collapse: Float[Tensor, "H H Pq"] | Float[Tensor, "H Pq"],
    *,
    attn_mask: Bool[Tensor, "#B #H #N #S"] | Bool[Tensor, "#N #S"] | None = None,
    causal: Causality | None = "flat",
    is_causal: bool | None = None,
    window: int | None = None,
    query_offset: int | Int[Tensor, ""] | None = None,
    document_ids: Int[Tensor, "B S"] | None = None,
    phase: Phase | None = None,
    rotary: RotaryConvention = "half",
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    layout: Layout = "bhsd",
    backend: str = "auto",
) -> Float[Tensor, "B H N d"]:
    r"""Interleaved Head Attention (Duvvuri et al., arXiv 2602.21371, section 3).

        Q̃[h,p] = Σ_m α^Q[m,h,p] Q[m]    K̃[g,q] = Σ_m α^K[m,g,q] K[m]    Ṽ[g,q] = Σ_m α^V[m,g,q] V[m]
        Õ[h,n,p] = Σ_{(s,q)} softmax_{(s,q)}( scale · Q̃[h,n,p] · K̃[g(h),s,q] ) Ṽ[g(h),s,q]
        O[h',n] = Σ_{h,p} R[h',h,p] Õ[h,n,p]

    One softmax runs over all visible pairs (s, q), with g(h) = ⌊h / (H/G)⌋. For P = 1 and identity
    mixing this is `torch.nn.functional.scaled_dot_product_attention`, whose layout it has.

    Args:
        query: base queries, already rotated by the model's own RoPE.
        key, value: base keys (rotated) and values, exactly what an ordinary KV cache holds; S ≥ N.
            G = H is MHA, G < H is GQA, G = 1 is MQA.
        alpha_q, alpha_k, alpha_v: weight α[m,h,p] of base head m in pseudo-head p of head h. Mixing
            tensors of another floating dtype are cast to that of `query`. `alpha_q` and `collapse`
            may have Pq < P columns: the pseudo-queries are then the last Pq of P, which is the
            operator whose other pseudo-queries nobody reads, for Pq/P of its price.
        collapse: weight R[h',h,p] of pseudo-output (h, p) in output head h'; (H, P) is the per-head
            form of the paper's Algorithm 1.
        attn_mask: True = attend, AND-ed on token level; holds for every pseudo pair.
        causal: `"flat"` (the paper's: virtual token n·P + p sees those up to its own index),
            `"token"` (a token sees all pseudo-heads of itself and of the past), or None.
        is_causal: SDPA's name; it must agree: True with `"flat"` or `"token"`, False with None.
        window: W tokens, the own one included (FlashAttention's window_size (W - 1, 0); see
            `iha.window_from_flash`). Flat: the W·P virtual tokens up to and with its own; token:
            n - s < W; None: abs(n - s) < W.
        query_offset: position of the first query among the S tokens; default S - N. A tensor with
            one element keeps a compiled decoding step free of recompilation.
        document_ids: tokens of different documents (packed sequences) do not see each other.
        phase: (cos, sin), each (P, r/2): a further rotation of pseudo-query and -key p by its
            phase, over the first r ≤ d dimensions.
        rotary: which dimensions a rotation pairs: `"half"` (Llama, NeoX) or `"pairs"` (GPT-J).
        dropout_p: dropout on the attention weights.
        scale: default 1/√d.
        softcap: c·tanh(score / c) on the scaled scores (Gemma 2).
        layout: order of the dimensions of query, key, value and output: `"bhsd"` for
            (B, H, N, d), `"bshd"` for FlashAttention's (B, N, H, d). The other order is refused
            where it can be told, that is unless there are as many tokens as heads.
        backend: `"auto"`, or a name of `iha.BACKENDS`; `"streamed:NAME"` also names what runs
            inside. `iha.explain_backend` says which would run, and why not the others.

    Returns:
        The shape and dtype of `query`. A query that sees nothing gives zeros.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and the shapes.
        ValueError: the backend named cannot do this; the message names one that can.
    """
    call = checked_call(
        query,
        key,
        value,
        alpha_q,
        alpha_k,
        alpha_v,
        collapse,
        attn_mask=attn_mask,
        causal=causal,
        window=window,
        query_offset=query_offset,
        document_ids=document_ids,
        phase=phase,
        rotary=rotary,
        dropout_p=dropout_p,
        scale=scale,
        softcap=softcap,
        is_causal=is_causal,
        layout=layout,
    )
    output = choose(call, backend).run(call)
    return output.transpose(1, 2) if layout == "bshd" else output
