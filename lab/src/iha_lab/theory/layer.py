"""An attention layer as the theorems have it: weights and mixing, no positions, no W_O."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from iha import HeadMixing, interleaved_head_attention
from iha.checks import checked_call
from iha.mixing import interleaved_inputs, interleaved_output


class Mixing(NamedTuple):
    """The four tensors, in the order in which the operator takes them."""

    alpha_q: Float[Tensor, "H H P"]
    alpha_k: Float[Tensor, "G G P"]
    alpha_v: Float[Tensor, "G G P"]
    collapse: Float[Tensor, "H H P"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """Q[h] = x W_Q[h], K[g] = x W_K[g], V[g] = x W_V[g]; without `mixing` it is MHA (or GQA).

    The theorems let values have another width m than queries and keys, n. The operator has one
    width for all, so the narrower are filled up with zeros, which change neither scores nor
    outputs.
    """

    w_q: Float[Tensor, "H E n"]
    w_k: Float[Tensor, "G E n"]
    w_v: Float[Tensor, "G E m"]
    mixing: Mixing | None = None

    def parameters(self) -> int:
        """Count the layer's numbers; MHA has no mixing."""
        return sum(t.numel() for t in (self.w_q, self.w_k, self.w_v, *(self.mixing or ())))

    def heads(
        self, x: Float[Tensor, "B N E"]
    ) -> tuple[Float[Tensor, "B H N d"], Float[Tensor, "B G N d"], Float[Tensor, "B G N d"]]:
        """Project to query, key, value of width d = max(n, m)."""
        width = max(self.w_q.shape[-1], self.w_v.shape[-1])
        heads = (x[:, None] @ weight for weight in (self.w_q, self.w_k, self.w_v))
        query, key, value = (pad(head, (0, width - head.shape[-1])) for head in heads)
        return query, key, value

    def attend(
        self, x: Float[Tensor, "B N E"], *, causal: Any = None, **arguments: Any
    ) -> Float[Tensor, "B N Hm"]:
        """Return [O_1, …, O_H] by `iha.interleaved_head_attention` with its own arguments."""
        out = interleaved_head_attention(
            *self.heads(x), *self._mixing(x), causal=causal, **arguments
        )
        return self._concatenated(out)

    def attend_linearly(self, x: Float[Tensor, "B N E"]) -> Float[Tensor, "B N Hm"]:
        """Attend with the paper's linear attention, Q Kᵀ V, in place of softmax(Q Kᵀ) V.

        Checks, mixing, interleaving and collapse are the operator's own functions; only the one
        standard attention between them, where it has softmax, is the plain product.
        """
        call = checked_call(*self.heads(x), *self._mixing(x), causal=None, scale=1.0)
        query, *shared = interleaved_inputs(call)
        key, value = (heads.repeat_interleave(call.heads_per_kv, 1) for heads in shared)
        return self._concatenated(interleaved_output(call, query @ key.mT @ value))

    def _mixing(self, x: Tensor) -> Mixing:
        """Return the mixing; for MHA one pseudo-head, which is the head."""
        if self.mixing is not None:
            return self.mixing
        H, G = self.w_q.shape[0], self.w_k.shape[0]
        return mixing_of(
            HeadMixing(H, num_kv_heads=G, pseudo_heads=1, init="identity", dtype=x.dtype)
        )

    def _concatenated(self, heads: Float[Tensor, "B H N d"]) -> Float[Tensor, "B N Hm"]:
        return heads[..., : self.w_v.shape[-1]].transpose(1, 2).flatten(2)


def mixing_of(module: HeadMixing) -> Mixing:
    tensors = (module.alpha_q, module.alpha_k, module.alpha_v, module.collapse)
    return Mixing(*(tensor.detach() for tensor in tensors))


def routers(heads: int) -> Mixing:
    """Make the one-hot routers of the paper's appendices B.2 and B.3, P = H.

    α^Q[m,h,j] = 1[m=h]·1[j=0], α^K[m,h,j] = α^V[m,h,j] = 1[m=j], R[h',h,j] = 1[h'=h]·1[j=0]:
    head h asks with its own query, once, and reads the keys and values of all heads.
    """
    eye = torch.eye(heads, dtype=torch.float64)
    own = torch.zeros(heads, heads, heads, dtype=torch.float64)
    own[:, :, 0] = eye
    every = eye[:, None].expand(heads, heads, heads)
    return Mixing(own, every, every, own)


def random(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw standard normal numbers in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
