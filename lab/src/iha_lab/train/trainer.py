"""The lab's training loop: transformers' `Trainer`, resumed exactly; Ctrl-C leaves a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from accelerate.utils import (  # pyright: ignore[reportMissingTypeStubs]
    broadcast_object_list,
)
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from iha_lab.files import writing
from iha_lab.machine import default_device, processes, rank
from iha_lab.train import checkpoints as kept

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
    micro_batch_size: int | None = None,
    tensorboard: Path | None = None,
    validation: Any = None,
    best_by: str | None = None,
    patience: int | None = None,
    say: Callable[[str], None] = print,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> Fit:
    """Train `model` in place on `train`; go on from the newest whole checkpoint, if there is one.

    `checkpoints` is a folder, or None for a run that keeps none. On a CPU a run that was killed and
    continued gives the very weights of one that was not: data order, dropout, optimizer and
    schedule all come from the checkpoint. SIGINT and SIGTERM save one and stop after the step.
    `say` is told where training goes on, and of checkpoints that are not whole.

    `batch_size` is that of a step, over all processes that torchrun or Accelerate started; each of
    them takes at most `micro_batch_size` of its share through the model together, and adds up
    gradients. `tensorboard` is a folder for a curve of everything that is logged.

    With `validation` the model is evaluated every `save_every` steps and after the last. `best_by`
    names a metric, the higher the better: the model ends as it was when that was best, and training
    ends once `patience` evaluations in a row did not improve it. `arguments` go to
    `TrainingArguments`, `options` to `Trainer`.

    Raises ValueError for a loss that is no number, OSError for a checkpoint that cannot be written.
    """
    if best_by is not None and checkpoints is None:
        raise ValueError("checkpoints must be a folder for best_by: the best one is kept there.")
    micro = min(micro_batch_size or batch_size, batch_size // processes() or 1)
    accumulated, rest = divmod(batch_size, micro * processes())
    if rest:
        raise ValueError(
            f"batch_size must be a multiple of micro_batch_size = {micro} times {processes()}"
            f" processes, got {batch_size}."
        )
    cpu = default_device().type == "cpu"
    given: dict[str, Any] = {
        "output_dir": str(checkpoints or tempfile.gettempdir()),
        "save_strategy": "no" if checkpoints is None else "steps",
        "save_steps": save_every,
        "save_total_limit": 2,
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": accumulated,
        "eval_strategy": "no" if validation is None else "steps",
        "eval_steps": save_every,
        "load_best_model_at_end": best_by is not None,
        "metric_for_best_model": best_by,
        "greater_is_better": True,
        "restore_callback_states_from_checkpoint": True,  # patience survives a kill too
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "seed": seed,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
    }
    watch = Watch(progress)
    callbacks: list[TrainerCallback] = [watch]
    if patience is not None:
        callbacks.append(EarlyStoppingCallback(patience))
    if tensorboard is not None and rank() == 0:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds

        callbacks.append(TensorBoardCallback(SummaryWriter(str(tensorboard))))
    trainer = SealingTrainer(
        model=model,
        args=TrainingArguments(**given | (arguments or {})),
        train_dataset=train,
        eval_dataset=validation,
        callbacks=callbacks,
        **options,
    )
    trainer.remove_callback(PrinterCallback)  # `progress` shows the loss
    watch.accelerator = trainer.accelerator
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        raise ValueError(
            "Accelerate's configuration asks for FSDP, which it has for accelerators only, and here"
            " it would train without; on CPUs set distributed_type to MULTI_CPU."
        )
    resumed: list[str | None] = [None]
    if checkpoints is not None and rank() == 0 and (found := kept.newest(checkpoints, say)):
        resumed = [str(found)]
        say(f"Going on from {found.name}.")
    with watch.signals():
        trainer.train(resume_from_checkpoint=broadcast_object_list(resumed)[0])
    model.eval()
    history = trainer.state.log_history
    return Fit(
        losses=[entry["loss"] for entry in history if "loss" in entry],
        evaluations=[entry for entry in history if "eval_loss" in entry],
        finished=not watch.stop or trainer.state.global_step >= steps,
    )


class SealingTrainer(Trainer):
    """A `Trainer` whose checkpoints say what they hold, and which says why one was not written.

    A baseline's own tensors do not decay, as the mixing tensors of IHA do not: most lie around an
    identity, and decay pulls to 0. The projections in a baseline do.
    """

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        names = super().get_decay_parameter_names(model)
        return [name for name in names if name.split(".")[-2:-1] != ["baseline"]]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # each process writes a part
                if rank() == 0:
                    kept.seal(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


class Watch(TrainerCallback):
    """Reports each step; turns Ctrl-C and a polite kill into a checkpoint and an orderly end."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.asked = False  # by a signal
        self.stop = False  # which all processes know
        self.accelerator: Any = None  # the trainer's, through which they talk

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
        if self.asked:
            self.accelerator.set_trigger()
        # Signals reach a run's processes at different steps, and all must stop at one.
        self.stop = self.accelerator.check_trigger()
        if self.stop:
            control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" not in (logs := kwargs["logs"]):
            return
        for name, what in (("loss", "the loss"), ("grad_norm", "the norm of the gradient")):
            if not math.isfinite(value := logs.get(name, 0.0)):
                raise ValueError(
                    f"{what} became {value} at step {state.global_step}; take a lower learning"
                    " rate, or look for bad examples."
                )
        self.progress(state.global_step, logs["loss"])
