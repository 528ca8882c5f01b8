"""Training examples: token ids, and labels that are the same or `NO_LOSS`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import pydantic_core
from torch import Tensor
from transformers import DataCollatorForSeq2Seq

NO_LOSS = -100


class Example(TypedDict):
    """A row, in the form that transformers' collator and `Trainer` take."""

    input_ids: list[int]
    labels: list[int]


def completed(tokenizer: Any, prompt: str, completion: str) -> Example:
    """A prompt that is given, and a completion to be learned."""
    given = tokenizer(prompt)["input_ids"]
    learned = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return {"input_ids": given + learned, "labels": [NO_LOSS] * len(given) + learned}


def read(files: Sequence[Path], tokenizer: Any, seq_len: int) -> list[Example]:
    """Examples from text files and JSONL files.

    A text file is one document. A line of JSONL holds {"text"}, {"prompt", "completion"} (the loss
    counts the completion alone) or {"messages"} (a chat, which the model's template writes out).
    Documents are cut into pieces of at most `seq_len` tokens; a completion that would be cut is
    refused.

    Raises ValueError that names the file and the line.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2 tokens, got {seq_len}.")
    found: list[Example] = []
    for file in files:
        if file.suffix in (".jsonl", ".ndjson"):
            for where, row in rows(file):
                found += _examples(tokenizer, row, where, seq_len)
        else:
            found += _pieces(tokenizer, tokenizer(text(file), verbose=False)["input_ids"], seq_len)
    if not found:
        raise ValueError(f"data holds no text: {', '.join(map(str, files))}.")
    return found


def existing(file: Path) -> Path:
    """`file`. ValueError where there is none."""
    if not file.is_file():
        raise ValueError(f"data file {str(file)!r} does not exist.")
    return file


def text(file: Path) -> str:
    """A file's content. ValueError for what is no file, or no UTF-8; it may begin with a BOM."""
    try:
        return existing(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"data file {str(file)!r} is not UTF-8 text.") from None


def rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(file and line, what stands there) for each line of a JSONL file that is not blank."""
    # Only these end a line: inside a string, JSON allows every other separator that Unicode has.
    lines = text(file).replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield f"{file}, line {number}", pydantic_core.from_json(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error}).") from None


def _examples(tokenizer: Any, row: Any, where: str, seq_len: int) -> list[Example]:
    match row:
        case {"prompt": str(prompt), "completion": str(completion)}:
            example = completed(tokenizer, prompt, completion + (tokenizer.eos_token or ""))
            if len(example["input_ids"]) > seq_len:
                raise ValueError(
                    f"{where}: prompt and completion have {len(example['input_ids'])} tokens, more"
                    f" than seq_len = {seq_len}; raise it."
                )
            # The first token has none before it to be predicted from.
            if not completion or all(label == NO_LOSS for label in example["labels"][1:]):
                raise ValueError(f"{where}: the completion is empty, so there is nothing to learn.")
            return [example]
        case {"messages": [_, *_] as messages}:
            tokens = tokenizer(
                _written(tokenizer, messages, where), add_special_tokens=False, verbose=False
            )
            return _pieces(tokenizer, tokens["input_ids"], seq_len)
        case {"text": str(document)}:
            return _pieces(tokenizer, tokenizer(document, verbose=False)["input_ids"], seq_len)
        case _:
            raise ValueError(
                f'{where}: must hold {{"text"}}, {{"prompt", "completion"}} or {{"messages"}}.'
            )


def _written(tokenizer: Any, messages: Sequence[Any], where: str) -> str:
    """A chat as the model's template writes it, special tokens included."""
    if tokenizer.chat_template is None:
        raise ValueError(f"{where}: has messages, and the tokenizer has no chat template.")
    for message in messages:
        match message:
            case {"role": str(), "content": str() | list()} | {"role": str(), "tool_calls": list()}:
                continue
            case _:
                raise ValueError(f'{where}: each message must have a "role" and a "content".')
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False)
    except Exception as error:  # a template is a program, and raises what it likes
        raise ValueError(f"{where}: the model's chat template refuses it ({error}).") from error


def _pieces(tokenizer: Any, tokens: list[int], seq_len: int) -> list[Example]:
    pieces = (tokens[start : start + seq_len] for start in range(0, len(tokens), seq_len))
    return [{"input_ids": piece, "labels": piece} for piece in pieces if len(piece) > 1]


def collator(tokenizer: Any) -> DataCollatorForSeq2Seq:
    """Pads a batch, labels with `NO_LOSS`."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_LOSS)


def batches(
    examples: Sequence[Example], batch_size: int, tokenizer: Any
) -> Iterator[dict[str, Tensor]]:
    pad = collator(tokenizer)
    for start in range(0, len(examples), batch_size):
        yield dict(pad(list(examples[start : start + batch_size])))
