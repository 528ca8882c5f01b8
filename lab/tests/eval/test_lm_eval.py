"""`lm_eval --model hf` on a folder of an IHA model: no command and no code of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import iha
from iha_lab.eval.harness import KeptLM, Settings
from lab.tests.eval.scripted import characters, save_jsonl
from tests.hf.families import tiny

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["~"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
# What `lm_eval run --model hf --model_args pretrained=FOLDER,…` calls.
ASK = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

def ask(**more):
    model = {"pretrained": sys.argv[1], **more}
    tasks = TaskManager(include_path=sys.argv[2], include_defaults=False)
    asked = {"tasks": ["sums"], "task_manager": tasks, "device": "cpu", "bootstrap_iters": 0}
    found = lm_eval.simple_evaluate("hf", model, **asked)
    return [row["resps"][0][0] for row in found["samples"]["sums"]]

try:
    print(json.dumps(ask()))
except Exception as error:
    print(json.dumps(str(error)))
assert "iha" not in sys.modules
print(json.dumps(ask(trust_remote_code=True)))
"""


def test_it_gives_the_answers_of_the_model_or_refuses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = iha.upcycle(tiny("llama"), pseudo_heads=2)
    with torch.no_grad():
        for parameter in iha.mixing_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    characters().save_pretrained(tmp_path / "model")
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(4)]
    save_jsonl(tmp_path / "tasks" / "sums.jsonl", rows)
    task = TASK.format(file=tmp_path / "tasks" / "sums.jsonl")
    (tmp_path / "tasks" / "sums.yaml").write_text(task)

    command = [sys.executable, "-c", ASK, str(tmp_path / "model"), str(tmp_path / "tasks")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    said = subprocess.run(
        command, env=environment, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True
    )
    without, trusted = (json.loads(line) for line in said.stdout.splitlines()[-2:])
    assert isinstance(without, str)  # never the base model's answers
    assert "iha" in without

    ours = KeptLM(str(tmp_path / "model"), tmp_path / "answers", Settings(prefill_chunk=None))
    expected = ours.model.generate(
        **ours.tokenizer([row["question"] for row in rows], return_tensors="pt"),
        max_new_tokens=8,
        do_sample=False,
    )
    texts = ours.tokenizer.batch_decode(expected[:, -8:], skip_special_tokens=True)
    assert trusted == texts
