"""What was measured for a claim, and whether it holds."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row of a table: `measured` has to be at most, or at least, `bound`.

    Attributes:
        claim: what a theorem or a control says.
        setting: the sizes.
        computed: what number was taken.
        remark: why it came out so.

    The verdict is read from the number; NaN satisfies nothing.
    """

    claim: str
    setting: str
    computed: str
    measured: float | int
    relation: Literal["≤", "≥"]
    bound: float | int
    remark: str = ""

    @property
    def holds(self) -> bool:
        if self.relation == "≤":
            return self.measured <= self.bound
        return self.measured >= self.bound

    @property
    def verdict(self) -> str:
        return "reproduced" if self.holds else "not reproduced"

    def row(self) -> list[str]:
        number = f"{_short(self.measured)} (wanted {self.relation} {_short(self.bound)})"
        return [self.claim, self.setting, self.computed, number, self.verdict]

    def record(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return {**dataclasses.asdict(self), "verdict": self.verdict}


class Findings(list[Finding]):
    """Rows of one setting, of which mostly the same number is taken."""

    def __init__(self, setting: str, computed: str = "") -> None:
        super().__init__()
        self.setting, self.computed = setting, computed

    def at_most(
        self, bound: float | int, measured: float | int, claim: str, **changes: str
    ) -> None:
        self._add("≤", bound, measured, claim, **changes)

    def at_least(
        self, bound: float | int, measured: float | int, claim: str, **changes: str
    ) -> None:
        self._add("≥", bound, measured, claim, **changes)

    def equal(self, wanted: int, counted: int, claim: str, computed: str = "", **more: str) -> None:
        computed = computed or f"|{counted} counted - formula|"
        self._add("≤", 0, abs(counted - wanted), claim, computed=computed, **more)

    def _add(self, relation: Any, bound: Any, measured: Any, claim: str, **changes: str) -> None:
        row = {"setting": self.setting, "computed": self.computed} | changes
        self.append(Finding(claim, measured=measured, relation=relation, bound=bound, **row))


COLUMNS = ["claim", "setting", "computed", "number", "verdict"]


def _short(number: float | int) -> str:
    return f"{number:.0f}" if float(number).is_integer() else f"{number:.2g}"
