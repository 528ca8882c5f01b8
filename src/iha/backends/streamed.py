"""Chunks of heads, one after the other, each recomputed in the backward pass.

The heads that share one key/value head, and that head's pseudo-keys and -values, need nothing of
the other heads' pseudo tensors: they are a call of their own, with rectangular mixing tensors. So
this runs G smaller calls through any other backend, sums their collapsed outputs, and checkpoints
each: what autograd keeps is the base tensors, and what is alive at any time is one chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from iha.call import Call, Refusal

if TYPE_CHECKING:
    from iha.backends import Backend

NAME = "streamed"


@dataclasses.dataclass(frozen=True)
class Streamed:
    """`inner`, chunk by chunk."""

    inner: Backend

    @property
    def NAME(self) -> str:
        return f"{NAME}:{self.inner.NAME}"

    def refusal(self, call: Call) -> Refusal | None:
        return self.inner.refusal(call)

    def run(self, call: Call) -> Tensor:
        outputs = (self._chunk(chunk) for chunk in chunks(call))
        if call.collapse.ndim == 2:
            return torch.cat(list(outputs), dim=1)
        total = next(outputs)
        for output in outputs:
            total = total + output
        return total

    def _chunk(self, call: Call) -> Tensor:
        if not call.requires_grad:
            return self.inner.run(call)
        names = ("query", "key", "value", "alpha_q", "alpha_k", "alpha_v", "collapse")

        def run(*tensors: Tensor) -> Tensor:
            return self.inner.run(call.replace(**dict(zip(names, tensors, strict=True))))

        tensors = (getattr(call, name) for name in names)
        keep_dropout = call.dropout_p > 0
        return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=keep_dropout)  # pyright: ignore[reportReturnType]


def chunks(call: Call) -> Iterator[Call]:
    """One call for each key/value head, with the query heads that share it."""
    for g in range(call.alpha_k.shape[1]):
        yield call.of_heads(g * call.heads_per_kv, (g + 1) * call.heads_per_kv)
