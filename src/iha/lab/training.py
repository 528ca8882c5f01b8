"""Fine-tuning with transformers' `Trainer`: resumable, and Ctrl-C leaves a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from iha.hf.upcycling import mixing_parameters
from iha.lab.data import Example, collator, rows

Progress = Callable[[int, float], None]  # (step, loss of that step)


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


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run did: the loss of each step, and whether it reached the last."""

    losses: list[float]
    finished: bool


def train(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    recipe: Recipe,
    checkpoints: Path | None,
    progress: Progress = lambda step, loss: None,
) -> Run:
    """Train every parameter; continue from the last whole one in `checkpoints`, if there is one.

    `checkpoints` is a folder, or None for a run that keeps none. On a CPU a run that was killed and
    continued gives the very weights of one that was not: data order, dropout, optimizer and
    schedule all come from the checkpoint. SIGINT and SIGTERM save one and stop after the step.
    """
    arguments = TrainingArguments(
        output_dir=str(checkpoints or tempfile.gettempdir()),
        save_strategy="no" if checkpoints is None else "steps",
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=max(1, recipe.steps // 10),
        logging_steps=1,
        save_steps=recipe.save_every,
        save_total_limit=2,
        seed=recipe.seed,
        disable_tqdm=True,
        report_to="none",
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type != "cpu",
    )
    watch = _Watch(progress)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(examples),  # pyright: ignore[reportArgumentType]
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        optimizers=(_optimizer(model, recipe), None),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)  # `progress` shows the loss
    checkpoint = None if checkpoints is None else last_checkpoint(checkpoints)
    with watch.signals():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.eval()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(losses, finished=trainer.state.global_step >= recipe.steps)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: `Trainer` writes its state file last."""
    whole: list[tuple[int, Path]] = []
    for file in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            whole.append((json.loads(file.read_text())["global_step"], file.parent))
        except (json.JSONDecodeError, KeyError):
            continue  # cut off while it was written
    return max(whole, default=(0, None))[1]


def _optimizer(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = []
    mixing: list[torch.nn.Parameter] = []
    if getattr(model.config, "iha", None) is not None:
        mixing = mixing_parameters(model)
        groups = [{"params": mixing, "lr": recipe.mixing_learning_rate}]
    known = {id(parameter) for parameter in mixing}
    others = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
    groups.insert(0, {"params": others, "lr": recipe.learning_rate})
    # No decay: it would pull pretrained weights, and identity-like mixing, towards zero.
    return torch.optim.AdamW(groups, weight_decay=0.0)


class _Watch(TrainerCallback):
    """Reports each step; turns Ctrl-C and a polite kill into a checkpoint and an orderly end."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.stop = False

    @contextlib.contextmanager
    def signals(self) -> Generator[None]:
        def ask(number: int, frame: object) -> None:
            if self.stop:  # the second time means now
                raise KeyboardInterrupt
            self.stop = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop:
            control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in (logs := kwargs["logs"]):
            self.progress(state.global_step, logs["loss"])
