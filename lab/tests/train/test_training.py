"""The training engine: every parameter trains, and a run goes on after a kill, bit for bit."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import iha
from iha_lab.data.examples import Example
from iha_lab.train.fitting import last_checkpoint
from iha_lab.train.training import Recipe, train
from lab.tests.data.test_examples import words
from tests.hf.families import tiny

RECIPE = Recipe(steps=6, batch_size=2, learning_rate=1e-3, save_every=2, seed=3)


def model() -> Any:
    """With dropout, so that the state of the random numbers counts."""
    torch.manual_seed(0)
    return iha.upcycle(tiny("llama", attention_dropout=0.2), 2)


def examples() -> list[Example]:
    chance = random.Random(0)
    texts = [[chance.randrange(2, 50) for _ in range(6 + i % 3)] for i in range(9)]
    return [Example(text, text) for text in texts]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_every_parameter_trains_and_the_loss_falls() -> None:
    trained = model()
    before = weights(trained)
    seen: list[int] = []
    run = train(
        trained,
        words(),
        examples(),
        Recipe(steps=12, batch_size=4),
        None,
        lambda s, _: seen.append(s),
    )
    assert run.finished
    assert len(run.losses) == 12 == len(seen)
    assert run.losses[-1] < run.losses[0]
    assert not trained.training
    for name, tensor in weights(trained).items():
        assert not torch.equal(tensor, before[name]), name


def test_mixing_tensors_have_a_learning_rate_of_their_own() -> None:
    trained = model()
    before = weights(trained)
    recipe = Recipe(steps=2, batch_size=2, learning_rate=0.0, mixing_learning_rate=1e-2)
    train(trained, words(), examples(), recipe, None)
    changed = {n for n, tensor in weights(trained).items() if not torch.equal(tensor, before[n])}
    assert changed
    assert all("head_mixing" in name for name in changed)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [3, 5])
def test_a_killed_run_goes_on_bit_for_bit(at: int, tmp_path: Path) -> None:
    whole = model()
    expected = train(whole, words(), examples(), RECIPE, tmp_path / "whole")

    def kill(step: int, loss: float) -> None:
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        train(model(), words(), examples(), RECIPE, tmp_path / "killed", kill)
    # Cut off while writing: a newer folder without its state file does not count.
    (tmp_path / "killed" / "checkpoint-5").mkdir()
    checkpoint = last_checkpoint(tmp_path / "killed")
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{at - 1}"

    again = model()
    run = train(again, words(), examples(), RECIPE, tmp_path / "killed")
    assert run == expected
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, weights(whole)[name]), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_checkpoint_and_the_handlers(number: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)

    def interrupt(step: int, loss: float) -> None:
        if step == 3:
            os.kill(os.getpid(), number)

    run = train(model(), words(), examples(), RECIPE, tmp_path, interrupt)
    assert not run.finished
    assert signal.getsignal(number) is before
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint is not None
    steps_done = int(checkpoint.name.split("-")[1])
    assert 3 <= steps_done < 6
    again, whole = model(), model()
    train(again, words(), examples(), RECIPE, tmp_path)
    train(whole, words(), examples(), RECIPE, None)
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, weights(whole)[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"save_every": -1}, "save_every must be at least 1"),
        ({"learning_rate": -1.0}, r"learning_rate must not be negative, got -1\.0"),
        (
            {"mixing_learning_rate": float("nan")},
            "mixing_learning_rate must not be negative, got nan",
        ),
    ],
)
def test_bad_recipes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


def test_a_loss_that_is_no_number_stops_with_a_sentence() -> None:
    broken = model()
    with torch.no_grad():
        broken.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss became nan at step 1; take a lower learning"):
        train(broken, words(), examples(), RECIPE, None)
