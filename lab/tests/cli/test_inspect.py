"""`iha inspect`: the table, and the page, clicked through in a browser."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Page, sync_playwright

import iha
from iha_lab import models
from iha_lab.cli import main
from iha_lab.report import inspector
from lab.tests.data.test_examples import text, words
from tests.hf.families import moved, tiny

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium")
PROMPT = text(0, 12)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["iha", "inspect", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models")
    for name, model in (
        ("iha", moved(iha.upcycle(tiny("llama", pad_token_id=98), 2, [0, 2]))),
        ("plain", tiny("llama", pad_token_id=98)),
        ("narrow", tiny("llama", pad_token_id=98, num_hidden_layers=2)),
    ):
        model.save_pretrained(where / name)
        words().save_pretrained(where / name)
    return where


def test_the_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, folder / "iha", "--prompt", PROMPT) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if "self_attn" in line and "│" in line]
    assert [re.search(r"layers\.\d", row)[0] for row in rows] == ["layers.0", "layers.2"]  # pyright: ignore[reportOptionalSubscript]
    assert re.search(r"\d\.\d to \d\.\d", rows[0])
    assert run(monkeypatch, folder / "iha", "--heads", "--layers", "2") == 0
    assert capsys.readouterr().out.count("layers.2.self_attn head") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plain"], "no mixing tensors"),
        (["iha", "--layers", "1"], "no layer with IHA"),
        (["iha", "--prompt", ""], "prompt holds no token"),
        (["iha", "--beside", "narrow", "-o", "page.html"], "other layers or heads"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(
    folder: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(folder / a) if (folder / a).is_dir() and a else a for a in arguments]
    assert run(monkeypatch, *given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_page_that_is_too_large_gets_coarser_and_then_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, arguments = tmp_path / "page.html", (folder / "iha", "--prompt", PROMPT)
    assert run(monkeypatch, *arguments, "-o", file) == 0
    fine = file.read_text()
    assert "are left out of this page" not in fine
    assert not re.search(r"(src|href)=", fine.split("<h1>")[1].split('id="library"')[0])
    library, *layers = (len(t) for t in re.findall(r'"text/plain" id="[^"]+">([^<]*)<', fine))
    monkeypatch.setattr(inspector, "MOST_BYTES", library + int(0.9 * sum(layers)))
    assert run(monkeypatch, *arguments, "-o", file) == 0
    assert file.stat().st_size < len(fine.encode()) - 0.1 * sum(layers)
    monkeypatch.setattr(inspector, "MOST_BYTES", 1000)
    assert run(monkeypatch, *arguments, "-o", tmp_path / "none.html") == 2
    assert not (tmp_path / "none.html").exists()


@pytest.fixture(scope="module")
def page_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, folder / "iha", "--prompt", PROMPT, "-o", file) == 0
    return file


@pytest.fixture
def page(page_file: Path) -> Iterator[Page]:
    errors: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(offline=True)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: errors.append(r.url) if r.url.startswith("http") else None)
        page.goto(page_file.as_uri())
        page.wait_for_function("document.body.dataset.ready")
        yield page
        browser.close()
    assert errors == []


def shown(page: Page, state: str) -> torch.Tensor:
    """The weights of the map at the left, once the page is in `state`."""
    page.wait_for_function("state => document.body.dataset.ready === state", arg=state)
    return torch.tensor(page.evaluate("document.getElementById('heat-0').data[0].customdata"))


@needs_browser
def test_clicking_through_shows_what_the_model_computes(folder: Path, page: Page) -> None:
    model, tokenizer = models.load(folder / "iha")
    given = tokenizer(PROMPT, return_tensors="pt")
    patterns = list(iha.attention_patterns(model, given).values())
    plain = list(iha.attention_patterns(models.load(folder / "plain")[0], given).values())
    last = given["input_ids"].shape[1] - 1
    step = {"atol": 5e-3, "rtol": 0}

    page.get_by_label("Layer", exact=True).select_option("layers.2.self_attn")
    page.get_by_label("Head", exact=True).select_option("head 3")
    found = shown(page, f"2 3 all {last} light")
    torch.testing.assert_close(found, patterns[2].tokens[0, 3], **step)
    right = torch.tensor(page.evaluate("document.getElementById('heat-1').data[0].customdata"))
    torch.testing.assert_close(right, plain[2].tokens[0, 3], **step)

    page.get_by_label("Pair (p, q)", exact=True).select_option("(1, 0)")
    found = shown(page, f"2 3 1,0 {last} light")
    torch.testing.assert_close(found, patterns[2].pairs[0, 3, :, 1, :, 0], **step)
    assert "less than one" in page.get_by_role("status").inner_text()

    page.get_by_label("Token that reads", exact=True).select_option("4")
    shown(page, "2 3 1,0 4 light")
    rows = page.locator("#reads-0 tr")
    best = int(patterns[2].pairs[0, 3, 4, 1, :, 0].argmax())
    assert rows.first.inner_text().startswith(f"{best} ")
    assert f"reads: {best} " in str(page.locator("#heat-0").get_attribute("aria-label"))
    mixing = page.evaluate(
        "[0, 1, 2, 3].map(i => document.getElementById(`mixing-${i}`).data[0].z)"
    )
    tensors = model.model.layers[2].self_attn.head_mixing
    alpha_q, alpha_k, alpha_v, collapse = map(torch.tensor, mixing)
    near = {"atol": 6e-4, "rtol": 0}
    torch.testing.assert_close(alpha_q, tensors.alpha_q.data[:, :, 1].T, **near)
    torch.testing.assert_close(alpha_k, tensors.alpha_k.data[:, :, 0].T, **near)
    torch.testing.assert_close(alpha_v, tensors.alpha_v.data[:, :, 0].T, **near)
    torch.testing.assert_close(collapse, tensors.collapse.data[:, :, 1], **near)

    page.get_by_label("Layer", exact=True).select_option("layers.1.self_attn")  # without IHA
    torch.testing.assert_close(shown(page, "1 3 all 4 light"), patterns[1].tokens[0, 3], **step)
    assert page.locator("#mixing").is_hidden()


@needs_browser
def test_keyboard_dark_and_phone(page: Page) -> None:
    page.get_by_label("Layer", exact=True).focus()
    before = page.evaluate("document.body.dataset.ready").split()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown" if before[1] != "3" else "ArrowUp")
    page.wait_for_function(
        "was => document.body.dataset.ready.split(' ')[1] !== was", arg=before[1]
    )
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.body.dataset.ready.endsWith('dark')")
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("document.documentElement.scrollWidth <= 390")
    page.locator("#heat-0 .nsewdrag").click(position={"x": 20, "y": 15})
    page.wait_for_function("document.body.dataset.ready.split(' ')[3] === '0'")
    page.get_by_text("Show the table").click()
    assert page.get_by_role("cell", name="layers.2.self_attn").is_visible()
