"""Whatever is damaged in the newest checkpoint, the one before is taken, and training is exact."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from iha_lab.train.checkpoints import newest
from iha_lab.train.finetuning import Recipe, train
from lab.tests.data.test_examples import words
from lab.tests.train.test_finetuning import examples, model, weights


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = [(name, cut) for name in (
    "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json",
    "trainer_state.json", "training_args.bin", "seal.json",
)] + [(name, Path.unlink) for name in (
    "model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "seal.json",
)] + [("model.safetensors", flip), ("optimizer.pt", flip)]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Checkpoints at 4 and 6 of 8 steps, and the weights at the end of all 8."""
    folder, whole = tmp_path_factory.mktemp("run"), model()

    class Killed(Exception):
        pass

    def kill(step: int, loss: float) -> None:
        if step == 7:
            raise Killed

    recipe = Recipe(steps=8, batch_size=2, save_every=2)
    with pytest.raises(Killed):
        train(model(), words(), examples(), recipe, folder, kill)
    train(whole, words(), examples(), recipe, None)
    return folder, weights(whole)


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(
    name: str,
    damage: Callable[[Path], None],
    trained: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained[0], copy)
    damage(copy / "checkpoint-6" / name)
    said: list[str] = []
    assert newest(copy, said.append) == copy / "checkpoint-4"
    (line,) = said
    assert line.startswith("checkpoint-6 is not whole (")
    assert "an older one is tried" in line
    if name != "seal.json":
        assert name in line


def test_training_goes_on_exactly_from_the_one_before(
    trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoint-6" / "optimizer.pt").unlink()
    again, said = model(), list[str]()
    recipe = Recipe(steps=8, batch_size=2, save_every=2)
    train(again, words(), examples(), recipe, tmp_path / "run", say=said.append)
    assert said[1:] == ["Going on from checkpoint-4."]
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, trained[1][name]), name


def test_where_none_is_whole_training_starts_anew(
    trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    for checkpoint in (4, 6):
        cut(tmp_path / "run" / f"checkpoint-{checkpoint}" / "optimizer.pt")
    said: list[str] = []
    assert newest(tmp_path / "run", said.append) is None
    assert len(said) == 2
    assert newest(tmp_path / "nowhere", said.append) is None
