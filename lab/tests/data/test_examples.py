from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from iha_lab.data.examples import NO_LOSS, Example, batches, read


def words(chat: bool = False) -> Any:
    """A tokenizer of whole words: w0, w1, …"""
    vocabulary = {"<unk>": 0, "<end>": 1} | {f"w{i}": i + 2 for i in range(50)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer


def text(first: int, last: int) -> str:
    return " ".join(f"w{i}" for i in range(first, last))


def test_a_document_is_cut_and_nothing_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(text(0, 10))
    found = read([file], words(), seq_len=4)
    assert [len(e.input_ids) for e in found] == [4, 4, 2]
    assert [i for e in found for i in e.input_ids] == list(range(2, 12))
    assert all(e.labels == e.input_ids for e in found)


def test_jsonl_of_every_kind(tmp_path: Path) -> None:
    rows = [
        {"text": text(0, 3)},
        {"prompt": text(3, 5) + " ", "completion": text(5, 6) + " "},
        {"messages": [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}]},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    plain, completion, chat = read([file], words(chat=True), seq_len=8)
    assert plain == Example([2, 3, 4], [2, 3, 4])
    assert completion == Example([5, 6, 7, 1], [NO_LOSS, NO_LOSS, 7, 1])
    assert chat.input_ids == [9, 10]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"a\.jsonl, line 2: not JSON"),
        ('{"txt": "w1"}', r'a\.jsonl, line 2: must hold \{"text"\}'),
        ('["w1"]', r"a\.jsonl, line 2: must hold"),
        ('{"messages": []}', r"a\.jsonl, line 2: has messages, .* no chat template"),
        ('{"prompt": "w1 w2 w3", "completion": "w4"}', r"line 2: .* have 5 tokens, .* seq_len = 3"),
    ],
)
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "w1 w2"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read([file], words(), seq_len=3)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.txt' does not exist"):
        read([tmp_path / "missing.txt"], words(), 8)
    binary, empty = tmp_path / "b.txt", tmp_path / "c.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    empty.write_text("")
    with pytest.raises(ValueError, match=r"b\.txt' is not UTF-8"):
        read([binary], words(), 8)
    with pytest.raises(ValueError, match=r"data holds no text: .*c\.txt"):
        read([empty], words(), 8)
    with pytest.raises(ValueError, match="seq_len must be at least 2"):
        read([empty], words(), 1)


def test_batches_are_padded_without_loss() -> None:
    examples = [
        Example([2, 3, 4], [NO_LOSS, 3, 4]),
        Example([5, 6], [5, 6]),
        Example([7, 8], [7, 8]),
    ]
    first, second = batches(examples, 2, words())
    assert first["labels"].tolist() == [[NO_LOSS, 3, 4], [5, 6, NO_LOSS]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert second["input_ids"].tolist() == [[7, 8]]
