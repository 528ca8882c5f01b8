"""The shift bank: the paper's filter theorem as something to learn, in a minute on one core.

One causal attention layer without MLP, norm or residual reads uniform random tokens, and at each
position names the last `offsets` of them. Each offset asks for one shift of the sequence, which is
one polynomial filter of degree one; the theorem counts how many of them a head can hold. Data never
repeat, so nothing can be memorised.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import pydantic
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from iha_lab import baselines
from iha_lab.experiments.config import Run
from iha_lab.experiments.online import Online, OnlineRun

SOLVED = 0.95  # accuracy at which an offset counts as solved


class Alone(nn.Module):
    """A decoder layer that is its attention and nothing else."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        return self.self_attn(hidden_states=hidden_states, **arguments)[0]


@dataclasses.dataclass(frozen=True)
class ShiftBankRun(OnlineRun):
    def model(self) -> Any:
        """Build the layer between an embedding and a classifier, equipped."""
        sweep = self.sweep
        config = self.decoder(sweep.vocabulary, layers=1, longest=sweep.seq_len)
        config = self.attention.configure(config)
        torch.manual_seed(self.seed)
        model: Any = LlamaForCausalLM(config)
        model.model.layers[0] = Alone(model.model.layers[0].self_attn)
        model.model.norm = nn.Identity()
        model.lm_head = nn.Linear(sweep.hidden_size, sweep.offsets * sweep.vocabulary)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.reset_parameters()  # 0.02, transformers' start, is for wide residual nets
        return baselines.equip(model, self.attention, sweep.seq_len)

    def in_the_paper(self) -> str:
        return "no trained layer; the filters' theorem is proved by construction"

    def batch(
        self, size: int, chance: torch.Generator
    ) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B n K"]]:
        """Draw sequences, and the K tokens before each position that has so many."""
        sweep = self.sweep
        tokens = torch.randint(sweep.vocabulary, (size, sweep.seq_len), generator=chance)
        # Window i of K tokens ends at position i + K − 1, and is what position i + K looks back on.
        return tokens, tokens.unfold(1, sweep.offsets, 1)[:, :-1].flip(-1)

    def logits(self, model: Any, tokens: Int[Tensor, "B N"]) -> Float[Tensor, "B n K V"]:
        """Name the last K tokens at the positions that have K before them."""
        sweep = self.sweep
        heads = model.model(input_ids=tokens).last_hidden_state[:, sweep.offsets :]
        return model.lm_head(heads).unflatten(-1, (sweep.offsets, sweep.vocabulary))

    def measure(
        self, model: Any, chance: torch.Generator
    ) -> tuple[dict[str, float], dict[str, Any]]:
        by_offset = self.right(model, *self.batch(self.sweep.questions, chance)).mean((0, 1))
        measures = {
            "offsets solved": float((by_offset >= SOLVED).sum()),
            "accuracy": float(by_offset.mean()),
        }
        return measures, {"accuracy by offset": [round(float(a), 4) for a in by_offset]}


class ShiftBank(Online):
    """`iha lab shift-bank`. An offset is solved at an accuracy of 95 % on test sequences."""

    RUN: ClassVar[type[Run[Any]]] = ShiftBankRun

    experiment: Literal["shift-bank"] = "shift-bank"
    vocabulary: int = pydantic.Field(16, ge=2)
    offsets: int = pydantic.Field(16, ge=1)
    seq_len: int = pydantic.Field(48, ge=2)
