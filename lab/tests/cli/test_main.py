"""The command line, as a user meets it: what it prints, what it leaves, how it fails."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import iha_lab.cli
from iha_lab.cli.main import main
from lab.tests.data.test_examples import text, words
from tests.hf.families import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its tokenizer."""
    where = tmp_path_factory.mktemp("tiny")
    tiny("llama").save_pretrained(where)
    words().save_pretrained(where)
    return where


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.txt"
    file.write_text(" ".join([text(0, 50)] * 4))
    return file


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["iha", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_upcycle_then_generate(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    assert run(monkeypatch, "upcycle", folder, output, "-p", 3, "--layers", "0, 2") == 0
    printed = capsys.readouterr().out
    assert "2 attention layers upcycled" in printed
    found = re.search(r"Largest logit difference (\S+), on logits of size", printed)
    assert found is not None
    assert float(found[1]) < 1e-4
    assert json.loads((output / "config.json").read_text())["iha"]["pseudo_heads"] == {
        "layers.0.self_attn": 3,
        "layers.2.self_attn": 3,
    }
    said = []
    for model in (folder, output):
        assert run(monkeypatch, "generate", model, "w1 w2 w3", "--max-new-tokens", 5) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].strip()


def test_finetune_upcycles_trains_and_saves(
    folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    command = ["finetune", folder, data, "-o", output, "-p", 2, "--steps", 3, "--seq-len", 16]
    assert run(monkeypatch, *command) == 0
    assert "13 sequences; starting." in capsys.readouterr().out
    assert any("head_mixing" in name for name in load_file(output / "model" / "model.safetensors"))
    assert run(monkeypatch, *command) == 0
    assert "This run is finished" in capsys.readouterr().out
    assert run(monkeypatch, *command[:-2], "--steps", 4, "--seq-len", 16) == 2
    assert "holds a run with steps = 3, not 4" in capsys.readouterr().err


def test_a_finetune_that_could_not_begin_may_be_mended(
    folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A wrong name does not claim the output folder."""
    options = ["-o", tmp_path / "run", "--steps", 1, "--seq-len", 16]
    assert run(monkeypatch, "finetune", folder, "no.txt", *options) == 2
    assert run(monkeypatch, "finetune", "/no/such/model", data, *options) == 2
    assert run(monkeypatch, "finetune", folder, data, *options, "-p", -1) == 2
    assert not (tmp_path / "run").exists()
    assert run(monkeypatch, "finetune", folder, data, *options) == 0
    assert "starting." in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_finetune_goes_on_bit_for_bit(
    number: int, folder: Path, data: Path, tmp_path: Path
) -> None:
    """Killed from outside, in the middle; the same command then ends with the same weights."""

    def start(output: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "iha_lab.cli.main", "finetune", str(folder), str(data)]
        command += ["-o", str(output), "-p", "2", "--steps", "60", "--seq-len", "16"]
        command += ["--save-every", "5", "--batch-size", "2"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    stopped = start(tmp_path / "stopped")
    checkpoints = tmp_path / "stopped" / "checkpoints"
    for _ in range(1200):
        if any(checkpoints.glob("checkpoint-*/trainer_state.json")):
            break
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.05)
    os.kill(stopped.pid, number)
    out, _ = stopped.communicate(timeout=60)
    assert not (tmp_path / "stopped" / "model").exists()
    if number == signal.SIGINT:
        assert stopped.returncode == 130
        assert "the same command goes on from there" in out
    for name in ("stopped", "whole"):
        process = start(tmp_path / name)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert ("continuing from" in out) == (name == "stopped")
    first, second = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("stopped", "whole")
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upcycle", "/no/such/model", "{out}"], "model folder '/no/such/model' does not exist"),
        (["upcycle", "model.gguf", "{out}"], "model file 'model.gguf' does not exist"),
        (["generate", "no-such/model", "w1"], "model 'no-such/model' is no folder here"),
        (["generate", "{folder}", ""], "prompt holds no token"),
        (["generate", "{damaged}", "w1"], "has a damaged .safetensors file"),
        (["upcycle", "{empty}", "{out}"], "holds no .safetensors file"),
        (["upcycle", "{folder}", "{folder}"], "is there already and not empty"),
        (
            ["upcycle", "{folder}", "{out}", "-p", "0"],
            "pseudo_heads must be an integer of at least 1",
        ),
        (["upcycle", "{folder}", "{out}", "--layers", "9"], "layers names 9"),
        (["upcycle", "{folder}", "{out}", "--rope", "spiral"], "rope must be one of"),
        (["finetune", "{folder}", "no.txt", "-o", "{out}"], "data file 'no.txt' does not exist"),
        (
            ["finetune", "{folder}", "no.txt", "-o", "{out}", "--steps", "0"],
            "steps must be at least 1",
        ),
        (["finetune", "{folder}", "no.txt", "-o", "{damaged}"], "run.json' is damaged"),
        (["quickstart", "--questions", "0", "-o", "{out}"], "questions must be at least 1"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"cut off")
    (tmp_path / "damaged" / "run.json").write_text("{cut off")
    places = {name: tmp_path / name for name in ("out", "empty", "damaged")} | {"folder": folder}
    assert run(monkeypatch, *(argument.format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "iha_lab.cli.main", raising=False)
    monkeypatch.delitem(sys.modules, "iha_lab.cli.bench", raising=False)
    with pytest.raises(SystemExit, match=r"needs typer, .* 'interleaved-head-attention\[cli\]'"):
        # Anew: importing the submodule has put it in the place of the function of its name.
        importlib.reload(iha_lab.cli).main()


@pytest.mark.parametrize("command", ["upcycle", "generate", "finetune", "quickstart"])
def test_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    assert "Usage" in capsys.readouterr().out
