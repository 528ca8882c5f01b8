"""What was measured for a claim, and whether it holds."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row of a table: `measured` has to be at most, or at least, `bound`.

    `claim` is what a theorem or a control says, `setting` the sizes, `computed` what number was
    taken, `remark` why it came out so. The verdict is read from the number; NaN satisfies nothing.
    """

    claim: str
    setting: str
    computed: str
    measured: float
    relation: Literal["≤", "≥"]
    bound: float
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
        """For JSON."""
        return {**dataclasses.asdict(self), "verdict": self.verdict}


COLUMNS = ["claim", "setting", "computed", "number", "verdict"]


def _short(number: float) -> str:
    return f"{number:.0f}" if float(number).is_integer() else f"{number:.2g}"
