"""The lab's training loop: transformers' `Trainer`, resumable; Ctrl-C leaves a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from iha_lab.machine import processes, rank

Progress = Callable[[int, float], None]  # (step, loss of that step)


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a training run did.

    `losses` has the loss of each step, also of those before a kill. `evaluations` has a row each:
    {"step", "eval_loss", ...}. `finished`: the last step, or the end of patience, was reached.
    """

    losses: list[float]
    evaluations: list[dict[str, float]]
    finished: bool


def fit(
    model: Any,
    train: Any,
    checkpoints: Path | None,
    progress: Progress = lambda step, loss: None,
    *,
    steps: int,
    batch_size: int,
    save_every: int,
    seed: int,
    at_once: int | None = None,
    tensorboard: Path | None = None,
    validation: Any = None,
    best_by: str | None = None,
    patience: int | None = None,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> Fit:
    """Train `model` in place on `train`; continue from the last whole checkpoint, if there is one.

    `checkpoints` is a folder, or None for a run that keeps none. On a CPU a run that was killed and
    continued gives the very weights of one that was not: data order, dropout, optimizer and
    schedule all come from the checkpoint. SIGINT and SIGTERM save one and stop after the step.

    `batch_size` is that of a step, over all processes that torchrun or Accelerate started; each of
    them takes at most `at_once` of its share through the model together, and adds up gradients.
    `tensorboard` is a folder for a curve of everything that is logged.

    With `validation` the model is evaluated every `save_every` steps and after the last. `best_by`
    names a metric, the higher the better: the model ends as it was when that was best, and training
    ends once `patience` evaluations in a row did not improve it. `arguments` go to
    `TrainingArguments`, `options` to `Trainer`.
    """
    if best_by is not None and checkpoints is None:
        raise ValueError("checkpoints must be a folder for best_by: the best one is kept there.")
    at_once = min(at_once or batch_size, batch_size // processes() or 1)
    if batch_size % (at_once * processes()):
        raise ValueError(
            f"batch_size must be a multiple of {at_once} sequences at once in {processes()}"
            f" processes, got {batch_size}."
        )
    given: dict[str, Any] = {
        "output_dir": str(checkpoints or tempfile.gettempdir()),
        "save_strategy": "no" if checkpoints is None else "steps",
        "max_steps": steps,
        "per_device_train_batch_size": at_once,
        "per_device_eval_batch_size": at_once,
        "gradient_accumulation_steps": batch_size // (at_once * processes()),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_steps": save_every,
        "save_total_limit": 2,
        "seed": seed,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": model.device.type == "cpu",
        "dataloader_pin_memory": model.device.type != "cpu",
    }
    if validation is not None:
        given |= {"eval_strategy": "steps", "eval_steps": save_every}
    if best_by is not None:
        given |= {"load_best_model_at_end": True, "metric_for_best_model": best_by}
        given |= {"greater_is_better": True}
        # How long nothing improved survives a kill too.
        given |= {"restore_callback_states_from_checkpoint": True}
    watch = _Watch(progress)
    callbacks: list[TrainerCallback] = [watch]
    if patience is not None:
        callbacks.append(EarlyStoppingCallback(patience))
    if tensorboard is not None and rank() == 0:
        callbacks.append(_tensorboard(tensorboard))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**given | (arguments or {})),
        train_dataset=train,
        eval_dataset=validation,
        callbacks=callbacks,
        **options,
    )
    trainer.remove_callback(PrinterCallback)  # `progress` shows the loss
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        raise ValueError(
            "Accelerate's configuration asks for FSDP, which it has for accelerators only, and here"
            " it would train without; on CPUs set distributed_type to MULTI_CPU."
        )
    checkpoint = None if checkpoints is None else last_checkpoint(checkpoints)
    with watch.signals():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.eval()
    history = trainer.state.log_history
    return Fit(
        losses=[entry["loss"] for entry in history if "loss" in entry],
        evaluations=[entry for entry in history if "eval_loss" in entry],
        finished=not watch.stop or trainer.state.global_step >= steps,
    )


def _tensorboard(folder: Path) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter  # which only the lab's extra has
    from transformers.integrations.integration_utils import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: `Trainer` writes its state file last."""
    whole: list[tuple[int, Path]] = []
    for file in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            whole.append((json.loads(file.read_text())["global_step"], file.parent))
        except (json.JSONDecodeError, KeyError):
            continue  # cut off while it was written
    return max(whole, default=(0, None))[1]


class _Watch(TrainerCallback):
    """Reports each step; turns Ctrl-C and a polite kill into a checkpoint and an orderly end."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.asked = False  # by a signal
        self.stop = False  # which all processes know

    @contextlib.contextmanager
    def signals(self) -> Generator[None]:
        def ask(number: int, frame: object) -> None:
            if self.asked:  # the second time means now
                raise KeyboardInterrupt
            self.asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop = _any(self.asked, args.device)
        if self.stop:
            control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in (logs := kwargs["logs"]):
            if not math.isfinite(logs["loss"]):
                raise ValueError(
                    f"the loss became {logs['loss']} at step {state.global_step}; take a lower"
                    " learning rate, or look for bad examples."
                )
            self.progress(state.global_step, logs["loss"])


def _any(asked: bool, device: torch.device) -> bool:
    """Whether any process was: signals reach them at different steps, and all must stop at one."""
    if not torch.distributed.is_initialized():
        return asked
    found = torch.tensor(int(asked), device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)
