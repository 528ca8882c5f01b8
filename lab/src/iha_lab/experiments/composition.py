"""Relation composition (arXiv 2602.21371, appendix D): R∘R and R∘R∘R of random Boolean matrices.

A matrix R ∈ {0,1}^{m×m} is a sequence of m² tokens, one an entry, in a one-layer bidirectional
encoder that classifies each: is (R∘R)_ij = ∨_k R_ik ∧ R_kj one? An entry depends on m pairs of
other tokens, which heads that each look at single tokens do not see together.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import BertConfig, BertForTokenClassification, EvalPrediction

from iha_lab import baselines, paper
from iha_lab.data.examples import NO_LOSS
from iha_lab.experiments.config import Progress, Run, Sweep
from iha_lab.experiments.records import Part, Result
from iha_lab.machine import default_device
from iha_lab.train.trainer import fit

PADDING = 2  # beside the tokens 0 and 1


class Relation(Part):
    """`factors` copies of R are composed; m uniform in `sizes`, P(R_ij = 1) = `density`."""

    factors: int = pydantic.Field(ge=2)
    sizes: tuple[int, int]
    density: float = pydantic.Field(gt=0, lt=1)

    @property
    def label(self) -> str:
        return "o".join("R" * self.factors)

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Relation:
        if not 1 <= self.sizes[0] <= self.sizes[1]:
            raise ValueError(f"sizes must be 1 ≤ smallest ≤ largest, got {self.sizes}")
        return self


def compose(relation: Bool[Tensor, "m m"], factors: int) -> Bool[Tensor, "m m"]:
    """Take the Boolean matrix product of `factors` copies."""
    product = relation
    for _ in range(factors - 1):
        product = (product.float() @ relation.float()) > 0
    return product


class Matrices(Dataset[dict[str, Tensor]]):
    """`count` random relations and their compositions, all from `seed`.

    Entry (i, j) stands at position i·M + j of M² tokens, M the largest size, whatever m is.
    """

    def __init__(self, relation: Relation, count: int, seed: str) -> None:
        chance = torch.Generator().manual_seed(int.from_bytes(seed.encode()[:7], "big"))
        smallest, largest = relation.sizes
        M = largest
        self.tokens = torch.full((count, M, M), PADDING)
        self.labels = torch.full((count, M, M), NO_LOSS)
        sizes = torch.randint(smallest, largest + 1, (count,), generator=chance)
        for i, m in enumerate(sizes.tolist()):
            entries = torch.rand(m, m, generator=chance) < relation.density
            self.tokens[i, :m, :m] = entries.long()
            self.labels[i, :m, :m] = compose(entries, relation.factors).long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index].flatten()
        return {
            "input_ids": tokens,
            "attention_mask": (tokens != PADDING).long(),
            "labels": self.labels[index].flatten(),
        }


@dataclasses.dataclass(frozen=True)
class CompositionRun(Run["Composition"]):
    relation: Relation
    learning_rate: float

    def model(self) -> Any:
        """Build the one layer; no attention is chosen yet."""
        sweep, N = self.sweep, self.relation.sizes[1] ** 2
        config = BertConfig(
            vocab_size=3,
            hidden_size=sweep.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=sweep.num_heads,
            intermediate_size=4 * sweep.hidden_size,
            max_position_embeddings=N,
            type_vocab_size=1,
            pad_token_id=PADDING,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        config.num_labels = 1
        config = self.matched(BertForTokenClassification, config, N)
        torch.manual_seed(self.seed)
        return BertForTokenClassification(config)

    def in_the_paper(self) -> str:
        points = paper.COMPOSITION.get(self.relation.label)
        if points is None:
            return "not in the paper"
        return f"IHA up to {points:+} points over 2-simplicial attention, the strongest baseline"

    def run(self, folder: Path, progress: Progress) -> Result:
        sweep = self.sweep
        model = baselines.equip(self.model(), self.attention).to(default_device())
        cost = baselines.cost(model, self.relation.sizes[1] ** 2)
        sets = {
            name: Matrices(self.relation, getattr(sweep, name), f"{name[:2]}{self.seed}")
            for name in ("train", "validation", "test")
        }
        epoch = -(-sweep.train // sweep.batch_size)

        def tell(step: int, loss: float) -> None:
            if step % 20 == 0 or step == 1:
                progress(step, sweep.epochs * epoch, f"loss {loss:.3f}")

        done = fit(
            model,
            sets["train"],
            folder / "checkpoints",
            tell,
            steps=sweep.epochs * epoch,
            batch_size=sweep.batch_size,
            save_every=epoch,
            seed=self.seed,
            validation=sets["validation"],
            best_by="accuracy",
            patience=sweep.patience,
            arguments={
                "learning_rate": self.learning_rate,
                "lr_scheduler_type": "constant_with_warmup",
                "warmup_steps": min(100, epoch),
                "per_device_eval_batch_size": 4 * sweep.batch_size,
            },
            compute_loss_func=loss,
            compute_metrics=accuracies,
        )
        if not done.finished:
            raise KeyboardInterrupt
        history = [(row["step"] / epoch, row["eval_accuracy"]) for row in done.evaluations]
        return Result(
            cost=cost.as_dict(),
            measures={
                **test(model, sets["test"], 4 * sweep.batch_size),
                "validation accuracy": max(accuracy for _, accuracy in history),
            },
            curves={"validation accuracy over epochs": history},
            notes={"steps": len(done.losses)},
        )


class Composition(Sweep):
    """`iha lab composition`. Accuracy is over entries, on test matrices, of the best epoch."""

    AXES: ClassVar[tuple[str, ...]] = ("relations", "attentions", "learning_rates", "seeds")
    RUN: ClassVar[type[Run[Any]]] = CompositionRun
    SELECT: ClassVar[tuple[str, str] | None] = ("learning_rates", "validation accuracy")

    experiment: Literal["composition"] = "composition"
    relations: tuple[Relation, ...] = pydantic.Field(min_length=1)
    learning_rates: tuple[float, ...] = pydantic.Field((1e-3, 1e-4), min_length=1)
    hidden_size: int = 128
    num_heads: int = 8
    train: int = pydantic.Field(40_000, ge=1)
    validation: int = pydantic.Field(5_000, ge=1)
    test: int = pydantic.Field(5_000, ge=1)
    batch_size: int = pydantic.Field(64, ge=1)
    epochs: int = pydantic.Field(200, ge=1)
    patience: int = pydantic.Field(10, ge=1)


def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Take binary cross-entropy over the entries that exist."""
    real = labels != NO_LOSS
    logits = outputs["logits"].squeeze(-1)
    return F.binary_cross_entropy_with_logits(logits[real], labels[real].float())


def accuracies(prediction: Any) -> dict[str, float]:
    """Take the share of right entries, and of matrices that are right in every entry."""
    logits, labels = prediction.predictions.squeeze(-1), prediction.label_ids
    real = labels != NO_LOSS
    right = (logits > 0) == labels
    return {
        "accuracy": float(right[real].mean()),
        "whole matrices": float((right | ~real).all(-1).mean()),
    }


@torch.no_grad()
def test(model: Any, matrices: Matrices, batch_size: int) -> dict[str, float]:
    """Take the `accuracies` of a model on matrices that it has not seen."""
    logits: list[Tensor] = []
    for tokens in matrices.tokens.flatten(1).to(model.device).split(batch_size):
        logits.append(model(tokens, attention_mask=(tokens != PADDING).long()).logits.cpu())
    labels = matrices.labels.flatten(1)
    return accuracies(EvalPrediction(torch.cat(logits).numpy(), labels.numpy()))
