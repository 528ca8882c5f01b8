"""Fine-tuning a language model on examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from iha.hf.upcycling import mixing_parameters
from iha_lab.data.examples import Example, collator, rows
from iha_lab.train.fitting import Fit, Progress, fit


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. The mixing tensors have weights of order 1, so they take larger steps."""

    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 1e-4
    mixing_learning_rate: float = 3e-3
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "mixing_learning_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")


def train(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    recipe: Recipe,
    checkpoints: Path | None,
    progress: Progress = lambda step, loss: None,
) -> Fit:
    """Train every parameter by `recipe`; stopped and continued as `fit` says."""
    return fit(
        model,
        rows(examples),
        checkpoints,
        progress,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        save_every=recipe.save_every,
        seed=recipe.seed,
        arguments={
            "learning_rate": recipe.learning_rate,
            "warmup_steps": max(1, recipe.steps // 10),
        },
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        optimizers=(optimizer(model, recipe.learning_rate, recipe.mixing_learning_rate), None),
    )


def optimizer(
    model: Any, learning_rate: float, mixing_learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW with a learning rate of the mixing tensors' own, where the model has them."""
    groups: list[dict[str, Any]] = []
    mixing: list[torch.nn.Parameter] = []
    if getattr(model.config, "iha", None) is not None:
        mixing = mixing_parameters(model)
        groups = [{"params": mixing, "lr": mixing_learning_rate}]
    known = {id(parameter) for parameter in mixing}
    others = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
    groups.insert(0, {"params": others, "lr": learning_rate})
    # No decay: it would pull pretrained weights, and identity-like mixing, towards zero.
    return torch.optim.AdamW(groups, weight_decay=0.0)
