"""Interleaved Head Attention."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
import torch

import iha
from iha.hf.attention_modules import attention_layers
from iha_lab.baselines.equipping import AttentionConfig

NAMES = {"q": "alpha_q", "k": "alpha_k", "v": "alpha_v", "o": "collapse"}


class InterleavedConfig(AttentionConfig):
    """Interleaved Head Attention (Duvvuri et al., arXiv 2602.21371), by `iha.upcycle`.

    `init` is as in `iha.HeadMixing`: "scratch" to train from nothing, "upcycle" for the exact
    start. `schedule` limits it to `iha.hybrid_schedule`'s layers and windows, which matches FLOPs.

    Ablations and controls:

    - `pseudo_heads: 1` is *folded*: mixing matrices that the projections could hold
      (`iha.HeadMixing.fold_`), so the functions are those of multi-head attention and only the
      optimisation differs. It is what most public code that is called IHA computes.
    - `pseudo_queries` = Pq ≤ P, and `causal` ("flat", the paper's, or "token").
    - `mixes`: which of queries, keys, values and outputs mix heads. The others stay plain: each
      pseudo-head is its own base head, R their mean, and none of it trains.
    - `learned: false`: interleaving by a mixing that stays as it started.
    - `init: shift`: pseudo-head p of head h starts as base head h + p·H/G, and its R gives it back
      to that head, 1/Pq of it. Keys and values shift by one head, so that query and key heads meet
      as they do in the plain model.
    """

    kind: Literal["iha"] = "iha"
    pseudo_heads: int = pydantic.Field(4, ge=1)
    pseudo_queries: int | None = pydantic.Field(default=None, ge=1)
    rope: Literal["virtual", "token", "fractional"] = "virtual"
    causal: Literal["flat", "token"] = "flat"
    collapse: Literal["full", "per-head"] = "full"
    init: Literal["scratch", "upcycle", "identity", "shift"] = "scratch"
    mixes: tuple[Literal["q", "k", "v", "o"], ...] = ("q", "k", "v", "o")
    learned: bool = True
    schedule: bool = False

    @pydantic.model_validator(mode="after")
    def _possible(self) -> InterleavedConfig:
        if self.pseudo_queries is not None and self.pseudo_queries > self.pseudo_heads:
            raise ValueError(
                f"pseudo_queries must be at most pseudo_heads = {self.pseudo_heads}, got"
                f" {self.pseudo_queries}"
            )
        if self.init == "shift" and self.collapse == "per-head":
            raise ValueError(
                "init = 'shift' gives pseudo-heads back to other heads; take collapse = 'full'"
            )
        return self

    @property
    def label(self) -> str:
        parts = ["folded"] if self.pseudo_heads == 1 else [f"iha-p{self.pseudo_heads}"]
        parts += [f"q{self.pseudo_queries}"] if self.pseudo_queries else []
        if self.pseudo_heads > 1:
            parts += [self.rope] if self.rope != "virtual" else []
            parts += ["token-causal"] if self.causal == "token" else []
        parts += ["per-head"] if self.collapse == "per-head" else []
        parts += [self.init] if self.init != "scratch" else []
        unmixed = [name for name in NAMES if name not in self.mixes]
        parts += ["only", *(name for name in NAMES if name in self.mixes)] if unmixed else []
        parts += [] if self.learned else ["frozen"]
        parts += ["schedule"] if self.schedule else []
        return "-".join(parts)

    def equip(self, model: Any, seq_len: int | None) -> Any:
        where: dict[str, Any] = {}
        if self.schedule:
            if seq_len is None:
                raise ValueError(
                    "seq_len must be given for iha with schedule=True: windows follow it."
                )
            if not all(layer.causal for layer in attention_layers(model)):
                raise ValueError(
                    f"schedule=True has windows for causal layers, and {type(model).__name__} has"
                    " others; set schedule=False."
                )
            layers = model.config.num_hidden_layers
            schedule = iha.hybrid_schedule(layers, seq_len, self.pseudo_heads)
            where = {"layers": schedule.layers, "window": schedule.window}
        iha.upcycle(
            model,
            self.pseudo_heads,
            pseudo_queries=self.pseudo_queries,
            rope=self.rope if self.pseudo_heads > 1 else "token",  # one phase is none
            init="identity" if self.init == "shift" else self.init,
            causal=self.causal,
            per_head_collapse=self.collapse == "per-head",
            **where,
        )
        for mixing in model.modules():
            if isinstance(mixing, iha.HeadMixing):
                self._start(mixing)
        return model

    @torch.no_grad()
    def _start(self, mixing: iha.HeadMixing) -> None:
        if self.init == "shift":
            shift(mixing)
        plain = iha.HeadMixing(
            mixing.num_heads,
            num_kv_heads=mixing.num_kv_heads,
            pseudo_heads=mixing.pseudo_heads,
            pseudo_queries=mixing.pseudo_queries,
            init="identity",
            per_head_collapse=mixing.per_head_collapse,
            device=mixing.alpha_q.device,
        )
        for letter, name in NAMES.items():
            tensor = getattr(mixing, name)
            if letter not in self.mixes:
                tensor.copy_(getattr(plain, name))
            tensor.requires_grad_(self.learned and letter in self.mixes)


@torch.no_grad()
def shift(mixing: iha.HeadMixing) -> None:
    """Start pseudo-head p of head h as head h + p·H/G, of key/value head g as g + p."""
    H, P, Pq = mixing.num_heads, mixing.pseudo_heads, mixing.pseudo_queries
    for name in ("alpha_q", "alpha_k", "alpha_v"):
        alpha = getattr(mixing, name)
        heads, columns = alpha.shape[1:]
        step = H // mixing.num_kv_heads if name == "alpha_q" else 1
        eye = torch.eye(heads, device=alpha.device)
        # Pseudo-queries are the last Pq of P.
        shifted = [eye.roll(p * step, 0) for p in range(P - columns, P)]
        alpha.copy_(torch.stack(shifted, -1))
    mixing.collapse.copy_(mixing.alpha_q / Pq)
