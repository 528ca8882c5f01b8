"""Small decoders on data that are drawn anew at each step, so that nothing can be memorised."""

from __future__ import annotations

import abc
import dataclasses
import time
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig

from iha_lab import baselines
from iha_lab.data.examples import NO_LOSS
from iha_lab.experiments.config import Progress, Run, Sweep
from iha_lab.experiments.records import Result


@dataclasses.dataclass(frozen=True)
class OnlineRun(Run[Any]):
    """What a task adds: a model, batches, logits that stand where the labels do, and measures."""

    learning_rate: float

    def decoder(self, vocab_size: int, layers: int, longest: int, **more: Any) -> LlamaConfig:
        """Return the config of a small decoder with the sweep's width and heads."""
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=self.sweep.hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=self.sweep.num_heads,
            max_position_embeddings=longest,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
            tie_word_embeddings=False,
            **more,
        )

    @abc.abstractmethod
    def model(self) -> Any:
        """Build the model of this run's seed, equipped with its attention."""

    @abc.abstractmethod
    def batch(self, size: int, chance: torch.Generator) -> tuple[Int[Tensor, "B N"], Tensor]:
        """Draw sequences to train on, and labels, which are NO_LOSS where nothing is asked."""

    @abc.abstractmethod
    def logits(self, model: Any, tokens: Int[Tensor, "B N"]) -> Float[Tensor, "... V"]:
        """Take logits of the model, one row for each label."""

    @abc.abstractmethod
    def measure(
        self, model: Any, chance: torch.Generator
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Return measures of test data, the one that decides first, and notes."""

    def right(self, model: Any, tokens: Tensor, labels: Tensor) -> Float[Tensor, " ..."]:
        """Say of each label whether the model names it; NaN where nothing is asked."""
        with torch.no_grad():
            right = (self.logits(model, tokens).argmax(-1) == labels).float()
        return right.masked_fill(labels == NO_LOSS, torch.nan)

    def run(self, folder: Path, progress: Progress) -> Result:
        sweep, model = self.sweep, self.model()
        cost = baselines.cost(model, sweep.seq_len)
        chance = torch.Generator().manual_seed(self.seed)
        held_out = torch.Generator().manual_seed(10_000 + self.seed)
        validation = self.batch(sweep.questions, held_out)
        groups = self.groups(model)
        optimizer = torch.optim.Adam(groups, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], sweep.steps
        )
        history: list[tuple[int, float, float]] = []
        # Processor time, not the clock: other work shares the machine.
        spent, start = 0.0, time.process_time()
        for step in range(1, sweep.steps + 1):
            tokens, labels = self.batch(sweep.batch_size, chance)
            logits = self.logits(model, tokens).flatten(0, -2)
            loss = F.cross_entropy(logits, labels.flatten(), ignore_index=NO_LOSS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % sweep.evaluate_every == 0 or step == sweep.steps:
                spent += time.process_time() - start
                mean = float(self.right(model, *validation).nanmean())
                history.append((step, spent, mean))
                progress(step, sweep.steps, f"loss {loss.item():.3f}, accuracy {mean:.1%}")
                start = time.process_time()
        measures, notes = self.measure(model, held_out)
        return Result(
            cost=cost.as_dict(),
            measures={
                **measures,
                "validation accuracy": history[-1][2],
                "training CPU seconds": round(spent, 2),
            },
            curves={
                "validation accuracy over steps": [(n, accuracy) for n, _, accuracy in history],
                "CPU seconds over steps": [(n, round(seconds, 2)) for n, seconds, _ in history],
            },
            # Backward takes twice forward's.
            notes={**notes, "training FLOPs of a step": 3 * sweep.batch_size * cost.total_flops},
        )

    def groups(self, model: Any) -> list[dict[str, Any]]:
        """Split the parameters into the body's and those that plain attention lacks."""
        extra = ("head_mixing.", "baseline.")
        named = list(model.named_parameters())
        mixing = [p for name, p in named if any(part in name for part in extra)]
        body = [p for name, p in named if not any(part in name for part in extra)]
        groups = [
            {"params": body, "lr": self.learning_rate},
            {"params": mixing, "lr": self.learning_rate * self.sweep.mixing_rate},
        ]
        return [group for group in groups if group["params"]]


class Online(Sweep):
    """Adam with `learning_rate` as the top of one cycle (Smith, arXiv 1708.07120).

    CPU seconds are of the process, in training alone. `mixing_rate` is the learning rate of what
    plain attention lacks, over that of the body.
    """

    AXES: ClassVar[tuple[str, ...]] = ("attentions", "learning_rates", "seeds")
    SELECT: ClassVar[tuple[str, str] | None] = ("learning_rates", "validation accuracy")

    learning_rates: tuple[float, ...] = pydantic.Field((3e-3,), min_length=1)
    hidden_size: int = pydantic.Field(64, ge=1)
    num_heads: int = pydantic.Field(4, ge=1)
    mixing_rate: float = pydantic.Field(1.0, gt=0)
    steps: int = pydantic.Field(7500, ge=1)
    batch_size: int = pydantic.Field(32, ge=1)
    evaluate_every: int = pydantic.Field(250, ge=1)
    questions: int = pydantic.Field(256, ge=1)
