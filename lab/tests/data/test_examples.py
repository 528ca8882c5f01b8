from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from iha_lab.data.examples import NO_LOSS, Example, batches, read
from iha_lab.models import encode


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
    assert [len(e["input_ids"]) for e in found] == [4, 4, 2]
    assert [i for e in found for i in e["input_ids"]] == list(range(2, 12))
    assert all(e["labels"] == e["input_ids"] for e in found)


def test_jsonl_of_every_kind(tmp_path: Path) -> None:
    rows = [
        {"text": text(0, 3)},
        {"prompt": text(3, 5) + " ", "completion": text(5, 6) + " "},
        {"messages": [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}]},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    plain, completion, chat = read([file], words(chat=True), seq_len=8)
    assert plain == Example(input_ids=[2, 3, 4], labels=[2, 3, 4])
    assert completion == Example(input_ids=[5, 6, 7, 1], labels=[NO_LOSS, NO_LOSS, 7, 1])
    assert chat["input_ids"] == [9, 10]


def chat(*messages: Any) -> str:
    return json.dumps({"messages": messages})


USER = {"role": "user", "content": "w7"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not JSON"),
        ("[" * 100_000, "not JSON (recursion limit exceeded"),
        ('{"text": "\\ud800"}', "not JSON (unexpected end of hex escape"),
        ('{"txt": "w1"}', 'must hold {"text"}'),
        ('{"text": 3}', 'must hold {"text"}'),
        ('["w1"]', "must hold"),
        ('"w1"', "must hold"),
        ('{"messages": []}', "must hold"),
        ('{"prompt": "w1 w2 w3", "completion": "w4"}', "have 5 tokens, more than seq_len = 3"),
        ('{"prompt": "", "completion": ""}', "the completion is empty"),
        ('{"prompt": "w1", "completion": ""}', "the completion is empty"),
        ('{"prompt": "w1", "completion": " "}', "the completion is empty"),
        (chat({"role": "user"}), 'each message must have a "role" and a "content"'),
        (chat(USER, "w8"), 'each message must have a "role" and a "content"'),
        (chat({"role": None, "content": "w1"}), 'each message must have a "role"'),
        (chat({"role": "user", "content": None}), 'each message must have a "role"'),
        (chat(USER, USER), "the model's chat template refuses it (roles must alternate)"),
    ],
)
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    tokenizer = words(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index0 % 2 and m.role == 'user' %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }} {% endfor %}"
    )
    tokenizer.eos_token = None
    file = tmp_path / "ä.jsonl"
    end = "" if "completion" not in line else " w9"  # in place of the end token
    file.write_text('{"text": "w1 w2"}\n' + line.replace('w4"', f'w4{end}"') + "\n")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read([file], tokenizer, seq_len=3)
    assert str(error.value).startswith(f"{file}, line 2: ")
    assert len(str(error.value)) < 300


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(chat(USER))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: has messages, .* no chat template"):
        read([tmp_path / "a.jsonl"], words(), seq_len=8)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\v"])
@pytest.mark.parametrize(("start", "end"), [("\ufeff", "\n"), ("", "\r\n")])
def test_what_only_looks_like_a_line_end_is_text(
    separator: str, start: str, end: str, tmp_path: Path
) -> None:
    """JSON allows them in strings as they are, but for control characters; a BOM may come first."""
    row = json.dumps({"text": f"w1{separator}w2"}, ensure_ascii=False)
    file = tmp_path / "a.jsonl"
    file.write_bytes((start + row + end + row + end).encode())
    plain = tmp_path / "a.txt"
    plain.write_bytes((start + f"w1{separator}w2").encode())
    for name, count in ((file, 2), (plain, 1)):
        found = read([name], words(), seq_len=8)
        assert [example["input_ids"] for example in found] == [[3, 4]] * count


def test_special_tokens_of_a_chat_come_once(tmp_path: Path) -> None:
    """The template writes the first token; the tokenizer, which adds one too, does not again."""
    tokenizer = words(chat=True)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    first = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", first)]
    )
    tokenizer.chat_template = "<bos> " + tokenizer.chat_template
    (tmp_path / "a.jsonl").write_text(chat(USER))
    (found,) = read([tmp_path / "a.jsonl"], tokenizer, seq_len=8)
    assert found["input_ids"] == [first, 9]
    assert encode(tokenizer, "w7")["input_ids"].tolist() == [[first, 9]]
    assert encode(tokenizer, "w7", chat=False)["input_ids"].tolist() == [[first, 9]]


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
        Example(input_ids=[2, 3, 4], labels=[NO_LOSS, 3, 4]),
        Example(input_ids=[5, 6], labels=[5, 6]),
        Example(input_ids=[7, 8], labels=[7, 8]),
    ]
    first, second = batches(examples, 2, words())
    assert first["labels"].tolist() == [[NO_LOSS, 3, 4], [5, 6, NO_LOSS]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert second["input_ids"].tolist() == [[7, 8]]
