"""The training engine: every parameter trains, and a run goes on after a kill, bit for bit."""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import iha
from iha_lab.data.examples import Example
from iha_lab.train.checkpoints import newest
from iha_lab.train.finetuning import Recipe, train
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
    return [Example(input_ids=text, labels=text) for text in texts]


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
    checkpoint = newest(tmp_path / "killed", print)
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
    checkpoint = newest(tmp_path, print)
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
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"save_every": -1}, "save_every must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number at least 0"),
        (
            {"mixing_learning_rate": float("nan")},
            "mixing_learning_rate must be a finite number at least 0, got nan",
        ),
    ],
)
def test_bad_recipes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


@pytest.mark.parametrize("what", ["the loss", "the norm of the gradient"])
def test_a_number_that_is_none_stops_with_a_sentence(what: str, tmp_path: Path) -> None:
    """And no checkpoint holds what came of it."""
    broken = model()
    weight = broken.model.embed_tokens.weight
    if what == "the loss":
        with torch.no_grad():
            weight.fill_(float("nan"))
    else:
        weight.register_hook(lambda gradient: gradient * float("inf"))
    recipe = dataclasses.replace(RECIPE, save_every=1)
    with pytest.raises(ValueError, match=f"{what} became .* at step 1; take a lower learning"):
        train(broken, words(), examples(), recipe, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_full_disk_ends_in_a_sentence_and_the_same_goes_on(tmp_path: Path) -> None:
    """Whatever library meets it; what was begun is gone, so that its room is there again."""
    whole, again = model(), model()
    expected = train(whole, words(), examples(), RECIPE, None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: int, loss: float) -> None:
        if step == 3:  # the weights still fit, the optimizer's tensors are twice as large
            size = (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, before[1]))

    try:
        with pytest.raises(OSError, match=r"checkpoint-4' could not be written \(.+\); make room"):
            train(model(), words(), examples(), RECIPE, tmp_path, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}
    assert train(again, words(), examples(), RECIPE, tmp_path) == expected
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, weights(whole)[name]), name
