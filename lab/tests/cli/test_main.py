"""The command line, as a user meets it: what it prints, what it leaves, how it fails."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from iha_lab.cli import main
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
    assert "13 sequences." in capsys.readouterr().out
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
    assert "sequences." in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_finetune_goes_on_bit_for_bit(
    number: int, folder: Path, data: Path, tmp_path: Path
) -> None:
    """Killed from outside, in the middle; the same command then ends with the same weights."""

    def start(output: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "iha_lab.cli", "finetune", str(folder), str(data)]
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
    if number != signal.SIGKILL:
        assert stopped.returncode == 130
        assert "the same command goes on from there" in out
    for name in ("stopped", "whole"):
        process = start(tmp_path / name)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert ("Going on from checkpoint-" in out) == (name == "stopped")
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
            "pseudo_heads must be at least 1, got 0",
        ),
        (["upcycle", "{folder}", "{out}", "--layers", "9"], "layers names 9"),
        (["upcycle", "{folder}", "{out}", "--rope", "spiral"], "rope must be one of"),
        (["finetune", "{folder}", "no.txt", "-o", "{out}"], "data file 'no.txt' does not exist"),
        (
            ["finetune", "{folder}", "no.txt", "-o", "{out}", "--steps", "0"],
            "steps must be at least 1",
        ),
        (["finetune", "{folder}", "{data}", "-o", "{damaged}"], "run.json' is damaged"),
        (["finetune", "{folder}", "{data}", "-o", "{listed}"], "run.json' is damaged"),
        (["finetune", "{folder}", "{data}", "-o", "{foreign}"], "is not empty and has no run.json"),
        (["finetune", "{folder}", "{data}", "-o", "/proc/run"], "output '/proc/run' cannot be"),
        (["quickstart", "-o", "{foreign}"], "is not empty and has no run.json"),
        (["lab", "retrieval", "--launcher", "torchrun"], "launcher is for lm"),
        (["quickstart", "--questions", "0", "-o", "{out}"], "questions must be at least 1"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str],
    message: str,
    folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"cut off")
    (tmp_path / "damaged" / "run.json").write_text("{cut off")
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "run.json").write_text("[]")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    names = ("out", "empty", "damaged", "listed", "foreign")
    places = {name: tmp_path / name for name in names} | {"folder": folder, "data": data}
    assert run(monkeypatch, *(argument.format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_ctrl_c_while_libraries_are_imported_is_no_traceback(tmp_path: Path) -> None:
    """It reaches a command after typer, which is quick, and before PyTorch is there."""
    script = "import os, signal, sys\nclass Interrupt:\n" + textwrap.indent(
        textwrap.dedent("""\
            def find_spec(self, name, *rest):
                if name == os.environ["AT"]:
                    os.kill(os.getpid(), signal.SIGINT)
        """),
        "    ",
    )
    script += "sys.meta_path.insert(0, Interrupt())\nfrom iha_lab.cli import main\nmain()\n"
    for name in ("typer", "torch"):
        command = [sys.executable, "-c", script, "generate", "no-such-model", "w1"]
        done = subprocess.run(
            command, env={**os.environ, "AT": name}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 130, done.stderr
        assert "Traceback" not in done.stderr


def test_help_fits_one_screen_and_says_what_to_do_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 24
    assert "New here? Run 'iha quickstart'." in " ".join(said.split())
    order = ["See it work", "quickstart", "Use it on a model of yours", "upcycle", "finetune",
             "generate", "Study it", "eval", "bench", "lab"]  # fmt: skip
    places = [said.rindex(f"{word} ") for word in order]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ["data", "model", "seed"])
def test_a_run_on_what_changed_since_is_refused(
    name: str,
    folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where it is finished: it would be the model of other data."""
    model = tmp_path / "copied"
    shutil.copytree(folder, model)
    command = ["finetune", model, data, "-o", tmp_path / "run", "--steps", 1, "--seq-len", 16]
    assert run(monkeypatch, *command) == 0
    if name == "data":
        content = data.read_text()
        data.write_text(content.replace("w2", "w3", 1))  # of the same size
    elif name == "model":
        tiny("llama", seed=1).save_pretrained(model)
    capsys.readouterr()
    assert run(monkeypatch, *command, *(["--seed", 1] if name == "seed" else [])) == 2
    wanted = "seed" if name == "seed" else f"content of the {name}"
    assert f"holds a run with {wanted} =" in capsys.readouterr().err
    if name == "data":
        data.write_text(content)
        assert run(monkeypatch, *command) == 0
        assert "This run is finished" in capsys.readouterr().out


def test_a_second_process_in_one_folder_is_refused(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "run"
    command = ["finetune", folder, data, "-o", output, "--steps", 2000, "--seq-len", 16]
    first = subprocess.Popen(
        [sys.executable, "-m", "iha_lab.cli", *map(str, command)], stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(1200):
            if (output / "run.json").exists():
                break
            assert first.poll() is None
            time.sleep(0.05)
        assert run(monkeypatch, *command) == 2
        assert "is held by another process that works there" in capsys.readouterr().err
    finally:
        first.kill()
        first.wait()


def test_a_failed_save_blocks_no_second_try(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A disk that is full leaves no half-written model."""
    output = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        assert run(monkeypatch, "upcycle", folder, output) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"error: '{output}' could not be written (" in error
    assert list(tmp_path.iterdir()) == []
    assert run(monkeypatch, "upcycle", folder, output) == 0


def test_names_in_any_script(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, data, output = (tmp_path / name for name in ("módel 模", "дані\u2028.jsonl", "ü ber"))
    shutil.copytree(folder, model)
    data.write_text(json.dumps({"prompt": "w1 ", "completion": "w2"}))
    assert run(monkeypatch, "finetune", model, data, "-o", output, "--steps", 1) == 0
    assert run(monkeypatch, "generate", output / "model", "w1", "--max-new-tokens", 2) == 0


def test_two_processes_fine_tune_one_model(folder: Path, data: Path, tmp_path: Path) -> None:
    """torchrun: half of each batch in each process, and the first one speaks and saves."""
    ends: dict[int, dict[str, torch.Tensor]] = {}
    for count in (1, 2):
        output = tmp_path / str(count)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(count), "-m", "iha_lab.cli", "finetune", str(folder)]
        command += [str(data), "-o", str(output), "-p", "2", "--steps", "3", "--seq-len", "25"]
        command += ["--batch-size", "4"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("8 sequences.") == done.stdout.count("the model is in") == 1
        ends[count] = load_file(output / "model" / "model.safetensors")
    for name, tensor in ends[1].items():
        torch.testing.assert_close(ends[2][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
