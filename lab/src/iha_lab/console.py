"""Where progress goes; the command line gives a live one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable


@runtime_checkable
class Console(Protocol):
    def say(self, text: str) -> None: ...

    def section(self, title: str) -> None: ...

    def steps(self, title: str, total: int) -> Callable[[int, str], None]:
        """Start a progress bar; the result takes (how many are done, a word on how it goes)."""
        ...

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None: ...
