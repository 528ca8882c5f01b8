"""Questions of our own in the official formats, and models that answer what a test says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import iha
from iha_lab.eval.harness import KeptLM, Settings
from tests.hf.families import tiny

Answer = Callable[[str, int], str]  # (prompt, how often it was asked before) → answer


class Script:
    """In the place of a model's `generate`: answers what a test says."""

    def __init__(self, tokenizer: Any, answer: Answer) -> None:
        self.tokenizer = tokenizer
        self.answer = answer
        self.asked: list[str] = []

    def __call__(self, input_ids: Any, **_: Any) -> Any:
        prompts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        answers: list[str] = []
        for number, prompt in enumerate(prompts):
            before = self.asked.count(prompt) + prompts[:number].count(prompt)
            answers.append(self.answer(prompt, before))
        self.asked += prompts
        encoded = self.tokenizer(answers, padding=True, padding_side="right", return_tensors="pt")
        return torch.cat((input_ids, encoded["input_ids"]), 1)


def scripted(folder: Path, answer: Answer, batch_size: int = 2) -> tuple[KeptLM, Script]:
    model = KeptLM(save_tiny(folder / "model"), folder, Settings(batch_size=batch_size))
    model.model.generate = script = Script(model.tokenizer, answer)
    return model, script


def asked(prompt: str) -> str:
    """The last question of a prompt with examples."""
    return prompt.rsplit("Question: ", 1)[1].split("\n")[0]


def number(prompt: str) -> int:
    """Of the gsm8k questions below."""
    return int(asked(prompt).split()[1].rstrip(":"))


def save_jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def gsm8k(folder: Path, count: int) -> Path:
    """A data folder: question n asks for n + n."""

    def row(n: int) -> dict[str, str]:
        return {
            "question": f"No. {n}: what is {n} + {n}?",
            "answer": f"It is {2 * n}.\n#### {2 * n}",
        }

    where = folder / "openai" / "gsm8k"
    save_jsonl(where / "train.jsonl", [row(n) for n in range(900, 910)])
    save_jsonl(where / "test.jsonl", [row(n) for n in range(count)])
    return folder


def characters() -> Any:
    """A tokenizer of single characters: whatever a tiny model writes is some text."""
    alphabet = "\n" + "".join(map(chr, range(32, 127)))
    vocabulary = {"<unk>": 0, "<end>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    core = Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")


def save_tiny(folder: Path, seed: int = 0, pseudo_heads: int = 0) -> str:
    """A tiny random Llama with a tokenizer of characters; upcycled, if pseudo-heads are given."""
    model = tiny("llama", seed=seed, max_position_embeddings=2048)
    if pseudo_heads:
        torch.manual_seed(0)
        iha.upcycle(model, pseudo_heads)
    model.save_pretrained(folder)
    characters().save_pretrained(folder)
    return str(folder)
