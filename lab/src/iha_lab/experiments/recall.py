"""Compositional recall: which value did this pair of tokens have?

Multi-query associative recall (Arora et al., Zoology, arXiv 2312.04927) with keys of two tokens. A
sequence states facts "a b v" and states them once more in another order; asked is each v the second
time. The keys (a, b) are a grid, all pairs of `side` first and `side` second tokens, so each token
alone stands in `side` facts, and only both together tell which fact is meant.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import pydantic
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM

from iha_lab import baselines
from iha_lab.data.examples import NO_LOSS
from iha_lab.experiments.config import Run
from iha_lab.experiments.online import Online, OnlineRun


@dataclasses.dataclass(frozen=True)
class RecallRun(OnlineRun):
    def model(self) -> Any:
        """Build a decoder with MLPs, equipped."""
        sweep = self.sweep
        longest = tokens_of(max(sweep.longer, default=sweep.side))
        config = self.decoder(
            3 * sweep.symbols, sweep.num_layers, longest, intermediate_size=2 * sweep.hidden_size
        )

        def make(config: Any) -> Any:
            torch.manual_seed(self.seed)
            return LlamaForCausalLM(config)

        model = make(self.matched(make, config, sweep.seq_len))
        return baselines.equip(model, self.attention, sweep.seq_len)

    def in_the_paper(self) -> str:
        return "not among its tasks"

    def batch(
        self, size: int, chance: torch.Generator, side: int | None = None
    ) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B N"]]:
        """Draw sequences of 2·side² facts, side = `sweep.side` unless given."""
        symbols: int = self.sweep.symbols
        m: int = self.sweep.side if side is None else side

        def order(count: int) -> Tensor:
            return torch.rand(size, count, generator=chance).argsort(1)

        first, second = order(symbols)[:, :m], order(symbols)[:, :m] + symbols
        value = torch.randint(symbols, (size, m**2), generator=chance) + 2 * symbols
        key = first.repeat_interleave(m, 1), second.repeat(1, m)
        facts = torch.stack((*key, value), -1)  # (B, m², 3)
        parts = [facts.take_along_dim(order(m**2)[..., None], 1) for _ in range(2)]
        labels = torch.full_like(facts, NO_LOSS)
        labels[:, :, 1] = parts[1][:, :, 2]  # the token before a value names it
        unasked = torch.full_like(facts, NO_LOSS)
        return torch.cat(parts, 1).flatten(1), torch.cat((unasked, labels), 1).flatten(1)

    def logits(self, model: Any, tokens: Int[Tensor, "B N"]) -> Float[Tensor, "B N V"]:
        return model(input_ids=tokens).logits

    def measure(
        self, model: Any, chance: torch.Generator
    ) -> tuple[dict[str, float], dict[str, Any]]:
        measures: dict[str, float] = {}
        for side in (self.sweep.side, *self.sweep.longer):
            right = self.right(model, *self.batch(self.sweep.questions, chance, side))
            measures[f"accuracy at {tokens_of(side)} tokens"] = float(right.nanmean())
        return measures, {}


def tokens_of(side: int) -> int:
    """Count the tokens of a sequence: facts of three tokens, each stated twice."""
    return 6 * side**2


class CompositionalRecall(Online):
    """`iha lab recall`. Trained on grids of `side`², tested there and on those of `longer`."""

    RUN: ClassVar[type[Run[Any]]] = RecallRun

    experiment: Literal["recall"] = "recall"
    symbols: int = pydantic.Field(16, ge=2)
    num_layers: int = pydantic.Field(2, ge=1)
    side: int = pydantic.Field(4, ge=1)
    longer: tuple[int, ...] = (5, 6)

    @property
    def seq_len(self) -> int:
        return tokens_of(self.side)

    @pydantic.model_validator(mode="after")
    def _distinct(self) -> CompositionalRecall:
        if max((self.side, *self.longer)) > self.symbols:
            raise ValueError(
                f"side and longer must be at most symbols = {self.symbols}, got {self.side} and"
                f" {list(self.longer)}: a grid needs as many different tokens"
            )
        return self
