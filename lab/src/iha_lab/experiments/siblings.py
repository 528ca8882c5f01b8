"""Fine-tune a model with IHA and without, equally, and ask both the harness's questions.

`python -m iha_lab.experiments.siblings` writes passages of facts with one question each
(iha_lab.data.retrieval), gives them to `iha finetune` twice, and compares the two models by
`iha eval` on RULER's second multi-key task, which neither has seen. Stopped, the same command goes
on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from iha_lab.data.retrieval import RetrievalTask
from iha_lab.files import write_text

MODULE = "iha_lab.experiments.siblings"
BATCH = 4
ENDS = {False: "end in a word", True: "end in a space"}


def main(
    steps: Annotated[int, typer.Option(help="Of fine-tuning, for both.")] = 20,
    space: Annotated[
        bool, typer.Option("--space", help="Training prompts end in a space, as RULER's do not.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("results/eval-siblings"),
) -> None:
    work = Path("runs") / output.name
    data = work / "passages.jsonl"
    asked = RetrievalTask(num_facts=16).questions("train", steps * BATCH)
    # RULER's prompts end in a word, not in a space. Where training prompts had one, a model that
    # had learned the task could still end its answer at once (results/eval-siblings-space).
    rows = [{"prompt": q.prompt.rstrip(), "completion": f" {q.answer}"} for q in asked]
    if space:
        rows = [{"prompt": q.prompt, "completion": q.answer} for q in asked]
    write_text(data, "".join(json.dumps(row) + "\n" for row in rows))
    for name, pseudo_heads in (("plain", 0), ("iha", 4)):
        iha("finetune", "smollm2", data, "-o", work / name, "-p", pseudo_heads,
            "--steps", steps, "--batch-size", BATCH)  # fmt: skip
    models = [work / name / "model" for name in ("plain", "iha")]
    iha("eval", *models, "--tasks", "niah_multikey_2", "--lengths", "512",
        "--limit", 40, "--max-new-tokens", 32, "-o", output)  # fmt: skip
    # Last: `iha eval` takes no folder that holds something else.
    training = {"steps": steps, "batch_size": BATCH, "prompts": ENDS[space]}
    write_text(output / "training.json", json.dumps(training) + "\n")


def command(training: dict[str, Any]) -> str:
    """Write the command that gives a folder, from its training.json."""
    space = training["prompts"] == ENDS[True]
    name = "eval-siblings-space" if space else "eval-siblings"
    more = " --space" if space else ""
    return f"python -m {MODULE} --steps {training['steps']}{more} -o results/{name}"


def iha(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "iha_lab.cli", *map(str, arguments)], check=True)


if __name__ == "__main__":
    typer.run(main)
