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

from iha_lab.data.retrieval import RetrievalTask
from iha_lab.files import write_text

FOLDER = Path("runs/siblings")
STEPS, BATCH = 20, 4
RESULTS = Path("results/eval-siblings")


def main() -> None:
    data = FOLDER / "passages.jsonl"
    asked = RetrievalTask(num_facts=16).questions("train", STEPS * BATCH)
    # RULER's prompts end in a word, not in a space. Where training prompts had one, a model that
    # had learned the task could still end its answer at once (results/eval-siblings-space).
    rows = [{"prompt": q.prompt.rstrip(), "completion": f" {q.answer}"} for q in asked]
    write_text(data, "".join(json.dumps(row) + "\n" for row in rows))
    for name, pseudo_heads in (("plain", 0), ("iha", 4)):
        iha("finetune", "smollm2", data, "-o", FOLDER / name, "-p", pseudo_heads,
            "--steps", STEPS, "--batch-size", BATCH)  # fmt: skip
    models = [FOLDER / name / "model" for name in ("plain", "iha")]
    iha("eval", *models, "--tasks", "niah_multikey_2", "--lengths", "512",
        "--limit", 40, "--max-new-tokens", 32, "-o", RESULTS)  # fmt: skip
    # Last: `iha eval` takes no folder that holds something else.
    training = {"steps": STEPS, "batch_size": BATCH, "prompts": "end in a word"}
    write_text(RESULTS / "training.json", json.dumps(training) + "\n")


def iha(*arguments: object) -> None:
    command = [sys.executable, "-m", "iha_lab.cli", *map(str, arguments)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
