"""The words that the file is written and read with."""

from __future__ import annotations

from typing import Any

FORWARD, BOTH, STEP = "forward", "forward + backward", "step"
Record = dict[str, Any]
