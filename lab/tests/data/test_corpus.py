"""Text: always the same, held out by document, every token learned once."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from iha_lab.data import corpus as texts
from iha_lab.data.corpus import Sequences, documents, learn_tokenizer, prepare

NAMES = [f"{i}.txt" for i in range(12)]


def write(folder: Path) -> Path:
    """Twelve files of 200 words each, none like another."""
    chance = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "épsilon", "zeta"]
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(NAMES):
        content = " ".join([f"file {i}:", *(chance.choice(words) for _ in range(200))])
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def test_the_standard_library_is_there_without_its_tests() -> None:
    found = list(documents("stdlib"))
    assert sum(len(text.encode()) for text in found) > 5_000_000
    source = Path(json.__file__).read_text(encoding="utf-8")
    assert found.count(source) == 1
    assert not any("class TestCase_" in text or "import test.support" in text for text in found)
    assert found == list(documents("stdlib"))


def test_a_folder_is_its_files_by_the_hash_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "text")
    (tmp_path / "text" / ".hidden").mkdir()
    (tmp_path / "text" / ".hidden" / "a.txt").write_bytes(b"\xff")
    order = sorted(NAMES, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    expected = [(tmp_path / "text" / name).read_text(encoding="utf-8") for name in order]
    assert list(documents(str(tmp_path / "text"))) == expected


def test_a_line_of_jsonl_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two", "id": 2}\n')
    assert list(documents(str(tmp_path))) == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: must hold"):
        list(documents(str(tmp_path)))


def test_a_data_set_is_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a folder where the hub's name stands, so this needs no network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    rows = [{"text": f"document {i}", "id": i} for i in range(5)]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(documents(f"hub:{tmp_path / 'set'}")) == [row["text"] for row in rows]
    (tmp_path / "set" / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match="has no column 'text' but 'body'"):
        list(documents(f"hub:{tmp_path / 'set'}"))


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'nowhere' is no folder here"):
        list(documents("nowhere"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xff")
    with pytest.raises(ValueError, match=r"picture\.png' is not UTF-8"):
        list(documents(str(tmp_path)))


def test_a_learned_tokenizer_is_the_same_for_the_same_text(tmp_path: Path) -> None:
    found = list(documents(str(write(tmp_path / "text"))))
    tokenizer = learn_tokenizer(found, 290)
    assert len(tokenizer) == 290
    for text in (*found, "日本 \n\t<|end|>x"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    again = learn_tokenizer(found, 290).backend_tokenizer.to_str()
    assert again == tokenizer.backend_tokenizer.to_str()


def test_the_first_documents_are_held_out_and_the_next_are_learned(tmp_path: Path) -> None:
    source = str(write(tmp_path / "source"))
    every = list(documents(source))
    held_out = len((every[0] + every[1]).encode())
    text = prepare(tmp_path / "text", source, 300, held_out_bytes=held_out - 1, train_tokens=10**9)
    parts = {"held_out": every[:2], "train": every[2:]}
    digest = hashlib.sha256()
    for name, some in parts.items():
        tokens = Sequences(text.folder / f"{name}.bin", 1, 1).tokens
        ended = "".join(document + texts.END for document in some)
        assert text.tokenizer.decode(tokens) == ended
        part = getattr(text, name)
        assert part.documents == len(some)
        assert part.bytes == sum(len(document.encode()) for document in some)
        assert part.tokens == len(tokens)
        for document in some:
            digest.update(hashlib.sha256(document.encode()).digest())
    assert text.sha256 == digest.hexdigest()


def test_no_more_is_read_than_is_learned(tmp_path: Path) -> None:
    source = str(write(tmp_path / "source"))
    text = prepare(tmp_path / "text", source, 300, held_out_bytes=1, train_tokens=600)
    assert text.train.tokens >= 600
    assert text.train.documents < 11
    last = Sequences(text.folder / "train.bin", 1, 1).tokens[:600]
    assert text.tokenizer.eos_token_id in last  # of the first document: the limit is in a later one


def test_what_is_prepared_is_kept_for_equal_settings(tmp_path: Path) -> None:
    source = str(write(tmp_path / "source"))
    settings = {"held_out_bytes": 1, "train_tokens": 600}
    first = prepare(tmp_path / "text", source, 300, **settings)
    (tmp_path / "source" / "new.txt").write_text("new " * 500)
    assert prepare(tmp_path / "text", source, 300, **settings) == first
    assert prepare(tmp_path / "text", source, 301, **settings) != first
    assert prepare(tmp_path / "text", source, 300, **settings) == first


def test_processes_share_one_corpus_that_the_first_writes(tmp_path: Path) -> None:
    """The others wait for it; one that is killed on the way leaves nothing that looks finished."""
    source = write(tmp_path / "source")
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\nfrom iha_lab.data import corpus\n"
        "read = corpus.documents\n"
        "def told(source):\n"
        "    for i, document in enumerate(read(source)):\n"
        "        if i == 5 and len(sys.argv) > 3: os._exit(9)\n"
        "        yield document\n"
        "    print('read', flush=True)\n"
        "corpus.documents = told\n"
        "found = corpus.prepare(Path(sys.argv[1]), sys.argv[2], 300, held_out_bytes=1,"
        " train_tokens=10**9)\n"
        "print(found.sha256, flush=True)\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "cache"), str(source)]
    assert subprocess.run([*command, "killed"], check=False).returncode == 9
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [worker.communicate()[0].split() for worker in workers]
    assert sorted(len(words) for words in said) == [1, 1, 2]  # one has read the text
    assert len({words[-1] for words in said}) == 1
    assert sum(path.is_dir() for path in (tmp_path / "cache").iterdir()) == 1


def test_every_token_is_predicted_once(tmp_path: Path) -> None:
    source = str(write(tmp_path / "source"))
    text = prepare(tmp_path / "text", source, 300, held_out_bytes=1, train_tokens=10**9)
    tokens = Sequences(text.folder / "train.bin", 1, 1).tokens.tolist()
    found = text.sequences("train", 7, 4)
    assert len(found) % 4 == 0
    assert 0 <= (len(tokens) - 1) // 7 - len(found) < 4
    rows = [found[i] for i in range(len(found))]
    given = [token for row in rows for token in row["input_ids"].tolist()]
    wanted = [token for row in rows for token in row["shift_labels"].tolist()]
    with pytest.raises(IndexError):
        found[len(found)]
    assert given == tokens[: len(given)]
    assert wanted == tokens[1 : len(given) + 1]


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    source = str(write(tmp_path / "source"))
    text = prepare(tmp_path / "text", source, 300, held_out_bytes=1, train_tokens=100)
    with pytest.raises(ValueError, match=r"part held_out has \d+ tokens, and one batch takes 8001"):
        text.sequences("held_out", 1000, 8)
    with pytest.raises(ValueError, match="ends within the first 1000000 bytes"):
        prepare(tmp_path / "text", source, 300, held_out_bytes=10**6, train_tokens=100)


def test_a_named_tokenizer_is_taken_as_it_is(tmp_path: Path) -> None:
    source = str(write(tmp_path / "source"))
    tokenizer = learn_tokenizer(["some other text " * 9], 280)
    tokenizer.save_pretrained(tmp_path / "named")
    named = str(tmp_path / "named")
    text = prepare(tmp_path / "text", source, named, held_out_bytes=1, train_tokens=100)
    assert text.tokenizer.get_vocab() == tokenizer.get_vocab()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "named")
    with pytest.raises(ValueError, match="has no end token"):
        prepare(tmp_path / "text", source, named, held_out_bytes=2, train_tokens=100)
