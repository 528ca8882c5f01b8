"""Text to train language models on: where it comes from, and its tokens on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import datasets  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
import torch
from filelock import FileLock
from tokenizers import Tokenizer
from tokenizers.implementations.byte_level_bpe import ByteLevelBPETokenizer
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from iha_lab.data.examples import rows, text
from iha_lab.files import new_folder, write_text

STDLIB, HUB = "stdlib", "hub:"
LEARNED_FROM = 4_000_000  # bytes that a tokenizer of our own is learned from
END = "<|end|>"

_NO_TEXT = {"test", "tests", "idle_test", "encodings"}  # tests, and tables of characters


def documents(source: str) -> Iterator[str]:
    """The documents of `source`, in an order that is always the same.

    - "stdlib": the Python files of this interpreter's standard library, 10 MB or so without tests
    - "hub:NAME" or "hub:NAME:CONFIG": the column "text" of a data set, read as a stream
    - a folder: each file is a document, and so is each line {"text": ...} of a .jsonl file

    Files come in the order of their names' hashes, so that any part of them is a mixture.

    Raises ValueError for what does not exist or is no text.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        yield from _files(root, _stdlib(root))
    elif source.startswith(HUB):
        yield from _hub(source.removeprefix(HUB))
    elif Path(source).is_dir():
        root = Path(source)
        files = (file for file in root.rglob("*") if file.is_file())
        shown = (f for f in files if "/." not in f"/{f.relative_to(root).as_posix()}")
        yield from _files(root, shown)
    else:
        raise ValueError(
            f"text must be {STDLIB!r}, 'hub:NAME' or a folder, and {source!r} is no folder here."
        )


def _stdlib(root: Path) -> Iterator[Path]:
    for name in sys.stdlib_module_names:
        for file in (root / f"{name}.py", *(root / name).rglob("*.py")):
            if file.is_file() and _NO_TEXT.isdisjoint(file.relative_to(root).parts):
                yield file


def _files(root: Path, files: Iterable[Path]) -> Iterator[str]:
    names = {file.relative_to(root).as_posix(): file for file in files}
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if not name.endswith(".jsonl"):
            yield text(names[name])
            continue
        for where, row in rows(names[name]):
            match row:
                case {"text": str(document)}:
                    yield document
                case _:
                    raise ValueError(f'{where}: must hold {{"text": ...}}.')


def _hub(name: str) -> Iterator[str]:
    path, _, config = name.partition(":")
    for row in datasets.load_dataset(path, config or None, split="train", streaming=True):
        if "text" not in row:
            raise ValueError(
                f"text 'hub:{name}' has no column 'text' but {', '.join(map(repr, row))}."
            )
        yield row["text"]


def learn_tokenizer(texts: Iterable[str], size: int) -> Any:
    """A byte-level BPE tokenizer of `size` tokens; the same texts give the same one."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        iter(texts), size, min_frequency=0, show_progress=False, special_tokens=[END]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """How much there is of the held-out text, or of the text to train on."""

    documents: int
    bytes: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text as tokens in a folder. `sha256` is of the documents that they stand for."""

    folder: Path
    sha256: str
    held_out: Part
    train: Part

    @property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder / "tokenizer")

    def sequences(
        self, name: Literal["held_out", "train"], seq_len: int, batch_size: int
    ) -> Sequences:
        """Raises ValueError where the part has less than one batch."""
        part: Part = getattr(self, name)
        if part.tokens <= seq_len * batch_size:
            raise ValueError(
                f"the text's part {name} has {part.tokens} tokens, and one batch takes"
                f" {seq_len * batch_size + 1}; take more text, or less of batch_size or seq_len."
            )
        return Sequences(self.folder / f"{name}.bin", seq_len, batch_size)


class Sequences(Dataset[dict[str, Tensor]]):
    """Tokens in a row, cut every N = `seq_len`: N tokens, and for each of them the one behind it.

    There are as many sequences as fill whole batches, so that every step and every process has
    equally many tokens.
    """

    def __init__(self, file: Path, seq_len: int, batch_size: int) -> None:
        self.tokens = np.memmap(file, dtype=np.uint32, mode="r")
        self.seq_len = seq_len
        count = (len(self.tokens) - 1) // seq_len
        self.count = count - count % batch_size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"index must be 0 to {self.count - 1}, got {index}.")
        N = self.seq_len
        piece = torch.from_numpy(self.tokens[index * N : index * N + N + 1].astype(np.int64))
        # transformers' loss takes `shift_labels` as they are, but only where there are `labels`.
        return {"input_ids": piece[:-1], "labels": piece[1:], "shift_labels": piece[1:]}


def prepare(
    cache: Path,
    source: str,
    tokenizer: int | str,
    *,
    held_out_bytes: int,
    train_tokens: int,
    progress: Callable[[str], None] = lambda note: None,
) -> Corpus:
    """Tokenize `source` into a folder of `cache`, or find it there.

    Any number of runs and processes share a cache: the first writes, document by document, while
    the others wait, and what it has not finished is not there.

    The first documents, until they have `held_out_bytes`, are held out. The next ones are for
    training, until they have `train_tokens` or the text ends; nothing behind them is read.
    `tokenizer` names one, or is the size of one that is learned from documents to train on. Each
    document is followed by the tokenizer's end token.
    """
    settings = [source, tokenizer, held_out_bytes, train_tokens]
    folder = cache / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with new_folder(folder) as partial:
                _write(partial, source, tokenizer, held_out_bytes, train_tokens, progress)
    known: dict[str, Any] = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    return Corpus(folder, known["sha256"], Part(**known["held_out"]), Part(**known["train"]))


def _write(
    folder: Path,
    source: str,
    named: int | str,
    held_out_bytes: int,
    train_tokens: int,
    progress: Callable[[str], None],
) -> None:
    stream = documents(source)
    held_out = _until(stream, held_out_bytes)
    first = _until(stream, LEARNED_FROM)
    if not first:
        raise ValueError(
            f"text {source!r} ends within the first {held_out_bytes} bytes, which are held out;"
            " take more text, or hold out less."
        )
    tokenizer = (
        learn_tokenizer(first, named)
        if isinstance(named, int)
        else AutoTokenizer.from_pretrained(named)
    )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {named!r} has no end token to put between documents.")
    tokenizer.save_pretrained(folder / "tokenizer")
    digest = hashlib.sha256()
    found: dict[str, Any] = {}
    for name, some, limit in (
        ("held_out", held_out, math.inf),
        ("train", chain(first, stream), train_tokens),
    ):
        part = Part(0, 0, 0)
        with (folder / f"{name}.bin").open("wb") as file:
            for document, tokens in _tokenized(some, tokenizer):
                size = len(document.encode())
                digest.update(hashlib.sha256(document.encode()).digest())
                np.array(tokens, dtype=np.uint32).tofile(file)
                part = Part(part.documents + 1, part.bytes + size, part.tokens + len(tokens))
                if part.tokens >= limit:
                    break
                if part.documents % 100 == 0:
                    progress(f"{part.tokens:,} tokens read")
        found[name] = dataclasses.asdict(part)
    write_text(folder / "corpus.json", json.dumps(found | {"sha256": digest.hexdigest()}))


def _until(stream: Iterator[str], size: int) -> list[str]:
    """The next documents, until they have `size` bytes."""
    found: list[str] = []
    while size > 0 and (document := next(stream, None)) is not None:
        found.append(document)
        size -= len(document.encode())
    return found


def _tokenized(stream: Iterable[str], tokenizer: Any) -> Iterator[tuple[str, list[int]]]:
    stream = iter(stream)
    while batch := list(islice(stream, 64)):  # which the tokenizer spreads over the cores
        rows = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        for document, tokens in zip(batch, rows, strict=True):
            yield document, [*tokens, tokenizer.eos_token_id]
