"""The shift bank: the paper's filter theorem as something to learn, in a minute on one core.

One causal attention layer without MLP, norm or residual reads uniform random tokens, and at each
position names the last `offsets` of them. Each offset asks for one shift of the sequence, which is
one polynomial filter of degree one; the theorem counts how many of them a head can hold. Data never
repeat, so nothing can be memorised.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from iha_lab import baselines
from iha_lab.experiments.config import Progress, Run, Sweep
from iha_lab.experiments.records import Result

SOLVED = 0.95  # accuracy at which an offset counts as solved


class Alone(nn.Module):
    """A decoder layer that is its attention and nothing else."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        return self.self_attn(hidden_states=hidden_states, **arguments)[0]


@dataclasses.dataclass(frozen=True)
class ShiftBankRun(Run["ShiftBank"]):
    learning_rate: float

    def model(self) -> Any:
        """Build the layer between an embedding and a classifier, equipped."""
        sweep = self.sweep
        config = LlamaConfig(
            vocab_size=sweep.vocabulary,
            hidden_size=sweep.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=sweep.num_heads,
            max_position_embeddings=sweep.seq_len,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
            tie_word_embeddings=False,
        )
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

    def run(self, folder: Path, progress: Progress) -> Result:
        sweep, model = self.sweep, self.model()
        cost = baselines.cost(model, sweep.seq_len)
        chance = torch.Generator().manual_seed(self.seed)
        held_out = torch.Generator().manual_seed(10_000 + self.seed)
        validation, test = (sweep.batch(sweep.questions, held_out) for _ in range(2))
        groups = self.groups(model)
        optimizer = torch.optim.Adam(groups, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], sweep.steps
        )
        history: list[tuple[int, float, float]] = []
        # Processor time, not the clock: other work shares the machine.
        spent, start = 0.0, time.process_time()
        for step in range(1, sweep.steps + 1):
            loss = self.loss(model, *sweep.batch(sweep.batch_size, chance))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % sweep.evaluate_every == 0 or step == sweep.steps:
                spent += time.process_time() - start
                mean = float(self.accuracies(model, *validation).mean())
                history.append((step, spent, mean))
                progress(step, sweep.steps, f"loss {loss.item():.3f}, accuracy {mean:.1%}")
                start = time.process_time()
        by_offset = self.accuracies(model, *test)
        return Result(
            cost=cost.as_dict(),
            measures={
                "offsets solved": float((by_offset >= SOLVED).sum()),
                "accuracy": float(by_offset.mean()),
                "validation accuracy": history[-1][2],
                "training CPU seconds": round(spent, 2),
            },
            curves={
                "validation accuracy over steps": [(n, accuracy) for n, _, accuracy in history],
                "CPU seconds over steps": [(n, round(seconds, 2)) for n, seconds, _ in history],
            },
            notes={
                "accuracy by offset": [round(float(a), 4) for a in by_offset],
                # Backward takes twice forward's.
                "training FLOPs of a step": 3 * sweep.batch_size * cost.total_flops,
            },
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

    def loss(self, model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(model, tokens).flatten(0, -2), labels.flatten())

    def logits(self, model: Any, tokens: Int[Tensor, "B N"]) -> Float[Tensor, "B n K V"]:
        """Name the last K tokens at the positions that have K before them."""
        sweep = self.sweep
        heads = model.model(input_ids=tokens).last_hidden_state[:, sweep.offsets :]
        return model.lm_head(heads).unflatten(-1, (sweep.offsets, sweep.vocabulary))

    @torch.no_grad()
    def accuracies(self, model: Any, tokens: Tensor, labels: Tensor) -> Float[Tensor, " K"]:
        """Take the share of right tokens at each offset."""
        return (self.logits(model, tokens).argmax(-1) == labels).float().mean((0, 1))


class ShiftBank(Sweep):
    """`iha lab shift-bank`. An offset is solved at an accuracy of 95 % on test sequences.

    Adam with `learning_rate` as the top of one cycle (Smith, arXiv 1708.07120). CPU seconds are of
    the process, in training alone.
    """

    AXES: ClassVar[tuple[str, ...]] = ("attentions", "learning_rates", "seeds")
    RUN: ClassVar[type[Run[Any]]] = ShiftBankRun
    SELECT: ClassVar[tuple[str, str] | None] = ("learning_rates", "validation accuracy")

    experiment: Literal["shift-bank"] = "shift-bank"
    learning_rates: tuple[float, ...] = pydantic.Field((3e-3,), min_length=1)
    vocabulary: int = pydantic.Field(16, ge=2)
    offsets: int = pydantic.Field(16, ge=1)
    seq_len: int = pydantic.Field(48, ge=2)
    hidden_size: int = pydantic.Field(64, ge=1)
    num_heads: int = pydantic.Field(4, ge=1)
    mixing_rate: float = pydantic.Field(1.0, gt=0)
    steps: int = pydantic.Field(7500, ge=1)
    batch_size: int = pydantic.Field(32, ge=1)
    evaluate_every: int = pydantic.Field(250, ge=1)
    questions: int = pydantic.Field(256, ge=1)

    def batch(
        self, size: int, chance: torch.Generator
    ) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B n K"]]:
        """Draw sequences, and the K tokens before each position that has so many."""
        tokens = torch.randint(self.vocabulary, (size, self.seq_len), generator=chance)
        # Window i of K tokens ends at position i + K − 1, and is what position i + K looks back on.
        return tokens, tokens.unfold(1, self.offsets, 1)[:, :-1].flip(-1)
