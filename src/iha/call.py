"""One validated call of the operator, and which (query, key) pairs it lets see each other.

Everything that the definition (docs/definition.md) says about arguments, masks and
positions is said here once. A backend receives a `Call` and never sees an unchecked argument.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from iha.rotary import Phase, RotaryConvention

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Causality = Literal["flat", "token"]
Layout = Literal["bhsd", "bshd"]
# Why a backend cannot run a call: a sentence that is put together only when somebody reads it.
Refusal = Callable[[], str]


def autocasts(device: torch.device) -> bool:
    """Whether autocast chooses the dtype of products on `device`."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call, checked, with every default filled in.

    There are P pseudo-keys and Pq ≤ P pseudo-queries per token. The pseudo-queries are the *last*
    Pq of P, so number j has the index p = P - Pq + j in every rule about positions.

    The mixing tensors may be *rectangular*: `alpha_q` (H, h, Pq) makes pseudo-queries for h of the
    H base heads, `collapse` (H', h, Pq) collapses those h. A chunk of heads is then itself a call,
    which is how the `streamed` backend composes with every other one. The public function only
    accepts square ones.
    """

    query: Float[Tensor, "B H N d"]
    key: Float[Tensor, "B G S d"]
    value: Float[Tensor, "B G S d"]
    alpha_q: Float[Tensor, "H h Pq"]
    alpha_k: Float[Tensor, "G g P"]
    alpha_v: Float[Tensor, "G g P"]
    collapse: Float[Tensor, "H h Pq"] | Float[Tensor, "h Pq"]
    _: dataclasses.KW_ONLY
    attn_mask: Bool[Tensor, "#B #h #N #S"] | None = None
    causal: Causality | None = "flat"
    window: int | None = None
    query_offset: int | Int[Tensor, ""] = 0
    document_ids: Int[Tensor, "B S"] | None = None
    phase: Phase | None = None
    rotary: RotaryConvention = "half"
    dropout_p: float = 0.0
    scale: float = 1.0
    softcap: float | None = None

    @property
    def pseudo_heads(self) -> int:
        """P, pseudo-keys per token."""
        return self.alpha_k.shape[2]

    @property
    def pseudo_queries(self) -> int:
        """Pq ≤ P, pseudo-queries per token."""
        return self.alpha_q.shape[2]

    @property
    def query_phase(self) -> Phase | None:
        """The rows of `phase` that the pseudo-queries have: the last Pq of P."""
        if self.phase is None:
            return None
        cos, sin = self.phase
        first = self.pseudo_heads - self.pseudo_queries
        return cos[first:], sin[first:]

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one key/value head, H / G."""
        return self.alpha_q.shape[1] // self.alpha_k.shape[1]

    @property
    def aligned(self) -> bool:
        """Whether the queries are known to be the last N of the S tokens."""
        return isinstance(self.query_offset, int) and (
            self.query_offset == self.key.shape[2] - self.query.shape[2]
        )

    @property
    def requires_grad(self) -> bool:
        tensors = (self.query, self.key, self.value, self.alpha_q, self.alpha_k, self.alpha_v)
        return torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, self.collapse))

    def without_autocast(self) -> AbstractContextManager[Any]:
        """For what is computed in float32 on purpose; nothing where autocast is off."""
        if not autocasts(self.query.device):
            return contextlib.nullcontext()
        return torch.autocast(self.query.device.type, enabled=False)

    def replace(self, **changes: object) -> Call:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def of_heads(self, first: int, last: int) -> Call:
        """The rectangular call of query heads `first` … `last - 1` and the key heads they share."""
        heads, mask = slice(first, last), self.attn_mask
        kv = slice(first // self.heads_per_kv, (last - 1) // self.heads_per_kv + 1)
        per_head = self.collapse.ndim == 2
        return self.replace(
            alpha_q=self.alpha_q[:, heads],
            alpha_k=self.alpha_k[:, kv],
            alpha_v=self.alpha_v[:, kv],
            collapse=self.collapse[heads] if per_head else self.collapse[:, heads],
            attn_mask=mask[:, heads] if mask is not None and mask.shape[1] > 1 else mask,
        )

    def of_queries(self, first: int, last: int) -> Call:
        """The call of query tokens `first` … `last - 1` alone, on all keys."""
        tokens, mask = slice(first, last), self.attn_mask
        return self.replace(
            query=self.query[:, :, tokens],
            query_offset=self.query_offset + first,
            attn_mask=mask[:, :, tokens] if mask is not None and mask.shape[2] > 1 else mask,
        )

    def query_positions(self) -> Int[Tensor, " N"]:
        """Absolute position n (0 … S-1) of each query token."""
        return torch.arange(self.query.shape[2], device=self.query.device) + self.query_offset

    def query_indices(self) -> Int[Tensor, " Pq"]:
        """Index p (P - Pq … P-1) of each pseudo-query."""
        first = self.pseudo_heads - self.pseudo_queries
        return torch.arange(first, self.pseudo_heads, device=self.query.device)

    def key_positions(self) -> Int[Tensor, " S"]:
        return torch.arange(self.key.shape[2], device=self.key.device)
