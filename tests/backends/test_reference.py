"""The reference against the definition spelt out pair by pair, and against plain attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import scaled_dot_product_attention

from iha import interleaved_head_attention
from tests.arguments import arguments, tensors


def spelt_out(arguments: dict[str, Any]) -> torch.Tensor:
    """Section 2 of the definition with Python loops; shares no code with the package."""
    Q, K, V = (arguments[name] for name in ("query", "key", "value"))
    aq, ak, av, R = (arguments[n] for n in ("alpha_q", "alpha_k", "alpha_v", "collapse"))
    (B, H, N, d), (G, S), P, Pq = Q.shape, K.shape[1:3], ak.shape[2], aq.shape[2]
    causal, W = arguments.get("causal", "flat"), arguments.get("window")
    offset = int(arguments.get("query_offset", S - N))
    mask, documents = arguments.get("attn_mask"), arguments.get("document_ids")
    mask = None if mask is None else mask.expand(B, H, N, S)
    scale, softcap = arguments.get("scale", 1 / math.sqrt(d)), arguments.get("softcap")

    def rotate(x: torch.Tensor, p: int) -> torch.Tensor:
        if arguments.get("phase") is None:
            return x
        cos, sin = (table[p].double() for table in arguments["phase"])
        x, r = x.clone(), len(cos)
        for i in range(r):
            a, b = (i, i + r) if arguments["rotary"] == "half" else (2 * i, 2 * i + 1)
            x[a], x[b] = x[a] * cos[i] - x[b] * sin[i], x[b] * cos[i] + x[a] * sin[i]
        return x

    def visible(b: int, h: int, i: int, p: int, s: int, q: int) -> bool:
        n = offset + i
        if mask is not None and not mask[b, h, i, s]:
            return False
        if documents is not None and documents[b, n] != documents[b, s]:
            return False
        if causal == "flat":
            ahead = (n * P + p) - (s * P + q)
            return ahead >= 0 and (W is None or ahead < W * P)
        if causal == "token":
            return s <= n and (W is None or n - s < W)
        return W is None or abs(n - s) < W

    O = torch.zeros_like(Q)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for i in range(N):
                for j in range(Pq):
                    p = P - Pq + j  # the last Pq of P
                    x = rotate(sum(aq[m, h, j] * Q[b, m, i] for m in range(H)), p)
                    scores, values = [], []
                    for s in range(S):
                        for q in range(P):
                            if visible(b, h, i, p, s, q):
                                y = rotate(sum(ak[m, g, q] * K[b, m, s] for m in range(G)), q)
                                score = scale * (x @ y)
                                if softcap:
                                    score = softcap * torch.tanh(score / softcap)
                                scores.append(score)
                                values.append(sum(av[m, g, q] * V[b, m, s] for m in range(G)))
                    if not scores:
                        continue
                    out = torch.stack(scores).softmax(0) @ torch.stack(values)
                    for o in range(H):
                        if R.ndim == 3:
                            O[b, o, i] += R[o, h, j] * out
                        elif o == h:
                            O[b, o, i] += R[h, j] * out
    return O


@settings(max_examples=15, deadline=None)
@given(arguments(softcap=True))
def test_it_is_the_definition(arguments: dict[str, Any]) -> None:
    arguments["query"], arguments["key"] = arguments["query"][:, :, :4], arguments["key"]
    for name, axis in (("attn_mask", 2),):
        if name in arguments:
            arguments[name] = arguments[name].narrow(axis, 0, min(4, arguments[name].shape[axis]))
    output = interleaved_head_attention(**arguments, backend="reference")
    torch.testing.assert_close(output, spelt_out(arguments), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("causal", ["flat", None])
def test_one_pseudo_head_and_identity_mixing_is_plain_attention(causal: Any) -> None:
    given = tensors(P=1, H=4, G=4)
    for name in ("alpha_q", "alpha_k", "alpha_v", "collapse"):
        given[name] = torch.eye(4, dtype=torch.float64)[:, :, None]
    output = interleaved_head_attention(**given, causal=causal, backend="reference")
    plain = scaled_dot_product_attention(
        given["query"], given["key"], given["value"], is_causal=causal is not None
    )
    torch.testing.assert_close(output, plain, atol=1e-12, rtol=0)


@settings(max_examples=15, deadline=None)
@given(arguments(softcap=True))
def test_fewer_pseudo_queries_are_those_that_the_collapse_reads(arguments: dict[str, Any]) -> None:
    """With P columns and R = 0 in the first P - Pq of them, whatever these pseudo-queries are."""
    P, Pq = arguments["alpha_k"].shape[2], arguments["alpha_q"].shape[2]
    whole = dict(arguments)
    for name, fill in (("alpha_q", torch.randn), ("collapse", torch.zeros)):
        given = arguments[name]
        unread = fill(*given.shape[:-1], P - Pq, dtype=given.dtype)
        whole[name] = torch.cat((unread, given), dim=-1)
    torch.testing.assert_close(
        interleaved_head_attention(**arguments, backend="reference"),
        interleaved_head_attention(**whole, backend="reference"),
        atol=1e-12,
        rtol=1e-10,
    )
