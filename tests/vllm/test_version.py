"""A version of vLLM that was not tested is refused in one sentence; this needs no vLLM."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from iha.integrations.vllm import check_version


@pytest.mark.parametrize("version", ["0.30.2", "0.33.0", "1.0.0.dev3+cpu"])
def test_it_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    with pytest.raises(ValueError, match=r"install a version from 0\.31 to 0\.32\."):
        check_version()


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.32.0rc1+cpu"])
def test_it_is_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    check_version()
