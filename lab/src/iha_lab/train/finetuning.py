"""Fine-tuning a language model on examples, and the whole of `iha finetune`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import iha
from iha.checks import checked_number, checked_size
from iha_lab import models, run_folder
from iha_lab.console import Console
from iha_lab.data.examples import Example, collator, existing, read
from iha_lab.files import fingerprint
from iha_lab.machine import processes, rank
from iha_lab.train.trainer import Fit, Progress, fit


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
            checked_size(name, getattr(self, name))
        for name in ("learning_rate", "mixing_learning_rate"):
            checked_number(name, getattr(self, name), at_least=0)
        checked_size("seed", self.seed, at_least=0, at_most=2**32 - 1)


def train(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    recipe: Recipe,
    checkpoints: Path | None,
    progress: Progress = lambda step, loss: None,
    say: Callable[[str], None] = print,
) -> Fit:
    """Train every parameter by `recipe`; stopped and continued as `fit` says."""
    return fit(
        model,
        examples,
        checkpoints,
        progress,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        save_every=recipe.save_every,
        seed=recipe.seed,
        say=say,
        arguments={"warmup_steps": max(1, recipe.steps // 10)},
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        optimizers=(optimizer(model, recipe.learning_rate, recipe.mixing_learning_rate), None),
    )


def optimizer(
    model: Any, learning_rate: float, mixing_learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW with a learning rate of the mixing tensors' own, where the model has them."""
    groups: Any = [p for p in model.parameters() if p.requires_grad]
    if getattr(model.config, "iha", None) is not None:
        groups = iha.parameter_groups(model, lr=learning_rate, mixing_lr=mixing_learning_rate)
    # No decay: it would pull pretrained weights towards zero.
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0)


def finetune(
    model: str,
    data: Sequence[Path],
    output: Path,
    pseudo_heads: int,
    seq_len: int,
    recipe: Recipe,
    console: Console,
) -> bool:
    """Train `model` on the files `data` and save it in `output`/model; whether the end was reached.

    Called again after a kill it goes on where it was, and it is refused where a setting, the data
    or the model is another than it was. `pseudo_heads` P upcycles the model first, unless it is 0.
    """
    if {os.environ.get(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED")} & {"true"}:
        raise ValueError(
            "iha finetune holds the whole model in each process; set Accelerate's distributed_type"
            " to MULTI_GPU or MULTI_CPU."
        )
    settings: dict[str, Any] = {
        "model": model,
        "data": [str(file) for file in data],
        "pseudo_heads": pseudo_heads,
        "seq_len": seq_len,
        **dataclasses.asdict(recipe),
        "processes": processes(),
        "content of the model": models.identity(model),
        "content of the data": [fingerprint(existing(file)) for file in data],
    }
    final = output / "model"
    if run_folder.check(output, settings) and final.exists():
        console.say(f"This run is finished; its model is in {final}.")
        return True
    found, tokenizer = models.load(model)
    examples = read(data, tokenizer, seq_len)
    torch.manual_seed(recipe.seed)
    if pseudo_heads:
        iha.upcycle(found, pseudo_heads)
    # Only now: what failed so far may be mended and called again with the same folder.
    with run_folder.claim(output, settings):
        console.say(f"{len(examples)} sequences.")
        tell = console.steps("train", recipe.steps)
        done = train(
            found,
            tokenizer,
            examples,
            recipe,
            output / "checkpoints",
            lambda step, loss: tell(step, f"loss {loss:.3f}"),
            console.say,
        )
        if done.finished and rank() == 0:
            models.save(found, tokenizer, final)
    if not done.finished:
        console.say(f"Stopped after {len(done.losses)} steps; the same command goes on from there.")
        return False
    console.say(f"Loss {done.losses[0]:.3f} → {done.losses[-1]:.3f}; the model is in {final}.")
    return True
