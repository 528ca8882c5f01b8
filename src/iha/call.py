"""One validated call of the operator, and which (query, key) pairs it lets see each other.

Everything that the definition (docs/design.md, "The definition") says about arguments, masks and
positions is said here once. A backend receives a `Call` and never sees an unchecked argument.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from iha.rotary import Phase, RotaryConvention

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Causality = Literal["flat", "token"]


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call, checked, with every default filled in.

    The mixing tensors may be *rectangular*: `alpha_q` (H, h, P) makes pseudo-queries for h of the H
    base heads, `collapse` (H', h, P) collapses those h. A chunk of heads is then itself a call,
    which is how the `streamed` backend composes with every other one. The public function only
    accepts square ones.
    """

    query: Float[Tensor, "B H N d"]
    key: Float[Tensor, "B G S d"]
    value: Float[Tensor, "B G S d"]
    alpha_q: Float[Tensor, "H h P"]
    alpha_k: Float[Tensor, "G g P"]
    alpha_v: Float[Tensor, "G g P"]
    collapse: Float[Tensor, "H h P"] | Float[Tensor, "h P"]
    attn_mask: Bool[Tensor, "#B #H #N #S"] | None = None
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
        """P."""
        return self.alpha_q.shape[2]

    @property
    def groups(self) -> int:
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

    def replace(self, **changes: object) -> Call:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def query_positions(self) -> Int[Tensor, " N"]:
        """Absolute position n (0 … S-1) of each query token."""
        return torch.arange(self.query.shape[2], device=self.query.device) + self.query_offset

    def key_positions(self) -> Int[Tensor, " S"]:
        return torch.arange(self.key.shape[2], device=self.key.device)


def visible_pairs(
    n: Int[Tensor, "*shape"],
    p: Int[Tensor, "*shape"],
    s: Int[Tensor, "*shape"],
    q: Int[Tensor, "*shape"],
    *,
    causal: Causality | None,
    window: int | None,
    pseudo_heads: int,
) -> Bool[Tensor, "*shape"]:
    """Whether pseudo-query (n, p) sees pseudo-key (s, q), by position alone.

    | `causal`  | without window        | with `window` = W                       |
    |-----------|-----------------------|-----------------------------------------|
    | `"flat"`  | s·P + q ≤ n·P + p     | and (n·P + p) - (s·P + q) < W·P         |
    | `"token"` | s ≤ n                 | and n - s < W                           |
    | `None`    | all                   | abs(n - s) < W                          |

    Positions are integer tensors that broadcast against each other.
    """
    if causal == "flat":
        distance = (n - s) * pseudo_heads + (p - q)
        reach = None if window is None else window * pseudo_heads
    else:
        distance = (n - s) + 0 * (p - q)
        reach = window
    if causal is not None:
        visible = distance >= 0
        return visible if reach is None else visible & (distance < reach)
    if reach is None:
        return torch.ones_like(distance, dtype=torch.bool)
    return distance.abs() < reach


def token_mask(call: Call) -> Bool[Tensor, "#B #H N S"] | None:
    """`attn_mask` and `document_ids` together, on token level; None where neither is given."""
    mask = call.attn_mask
    if mask is not None:
        mask = mask.expand(-1, -1, call.query.shape[2], call.key.shape[2])
    if call.document_ids is not None:
        ids = call.document_ids
        of_query = ids.index_select(1, call.query_positions())
        same = (of_query[:, :, None] == ids[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return mask


def virtual_mask(call: Call) -> Bool[Tensor, "#B #H N P S P"] | None:
    """Everything that limits visibility, for every pseudo pair; None where all is visible.

    Dense: (N·P)·(S·P) entries. `local` and `flash` never ask for it.
    """
    P = call.pseudo_heads
    tokens = token_mask(call)
    pairs = None
    if call.causal is not None or call.window is not None:
        pseudo = torch.arange(P, device=call.query.device)
        pairs = visible_pairs(
            call.query_positions()[:, None, None, None],
            pseudo[:, None, None],
            call.key_positions()[:, None],
            pseudo,
            causal=call.causal,
            window=call.window,
            pseudo_heads=P,
        )
    if tokens is None:
        return None if pairs is None else pairs[None, None]
    tokens = tokens[:, :, :, None, :, None]
    return tokens.expand(*tokens.shape[:3], P, -1, P) if pairs is None else tokens & pairs
