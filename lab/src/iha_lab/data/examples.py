"""Training examples: tokens, and which of them the loss counts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import DataCollatorForSeq2Seq

NO_LOSS = -100


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids, and labels that are the same or `NO_LOSS`."""

    input_ids: list[int]
    labels: list[int]

    @classmethod
    def of(cls, tokenizer: Any, prompt: str, completion: str) -> Example:
        """A prompt that is given, and a completion to be learned."""
        given = tokenizer(prompt)["input_ids"]
        learned = tokenizer(completion, add_special_tokens=False)["input_ids"]
        return cls(given + learned, [NO_LOSS] * len(given) + learned)


def read(files: Sequence[Path], tokenizer: Any, seq_len: int) -> list[Example]:
    """Examples from text files and JSONL files.

    A text file is one document. A line of JSONL holds {"text"}, {"prompt", "completion"} (the loss
    counts the completion alone) or {"messages"} (a chat). Documents are cut into pieces of at most
    `seq_len` tokens; a completion that would be cut is refused.

    Raises ValueError that names the file and the line.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2 tokens, got {seq_len}.")
    found: list[Example] = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"data file {str(file)!r} does not exist.")
        try:
            content = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"data file {str(file)!r} is not UTF-8 text.") from None
        if file.suffix not in (".jsonl", ".ndjson"):
            found += _pieces(tokenizer, content, seq_len)
            continue
        for number, line in enumerate(content.splitlines(), start=1):
            if line.strip():
                found += _from_line(tokenizer, line, f"{file}, line {number}", seq_len)
    if not found:
        raise ValueError(f"data holds no text: {', '.join(map(str, files))}.")
    return found


def _from_line(tokenizer: Any, line: str, where: str, seq_len: int) -> list[Example]:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}).") from None
    match row:
        case {"prompt": str(prompt), "completion": str(completion)}:
            example = Example.of(tokenizer, prompt, completion + (tokenizer.eos_token or ""))
            if len(example.input_ids) > seq_len:
                raise ValueError(
                    f"{where}: prompt and completion have {len(example.input_ids)} tokens, more"
                    f" than seq_len = {seq_len}; raise it."
                )
            return [example]
        case {"messages": list(messages)}:
            if tokenizer.chat_template is None:
                raise ValueError(f"{where}: has messages, and the tokenizer has no chat template.")
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            return _pieces(tokenizer, text, seq_len)
        case {"text": str(text)}:
            return _pieces(tokenizer, text, seq_len)
        case _:
            raise ValueError(
                f'{where}: must hold {{"text"}}, {{"prompt", "completion"}} or {{"messages"}}.'
            )


def _pieces(tokenizer: Any, text: str, seq_len: int) -> list[Example]:
    # `verbose=False`: a document longer than the model's context is expected, it is cut here.
    tokens: list[int] = tokenizer(text, verbose=False)["input_ids"]
    pieces = (tokens[start : start + seq_len] for start in range(0, len(tokens), seq_len))
    return [Example(piece, piece) for piece in pieces if len(piece) > 1]


def rows(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    """Examples in the form that transformers' collator and `Trainer` take."""
    return [dataclasses.asdict(example) for example in examples]


def collator(tokenizer: Any) -> DataCollatorForSeq2Seq:
    """Pads a batch, labels with `NO_LOSS`."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_LOSS)


def batches(
    examples: Sequence[Example], batch_size: int, tokenizer: Any
) -> Iterator[dict[str, Tensor]]:
    pad = collator(tokenizer)
    for start in range(0, len(examples), batch_size):
        yield dict(pad(rows(examples[start : start + batch_size])))
