"""Which backend a refusal names instead: policy, and no backend's own business."""

from __future__ import annotations

from iha.backends import sdpa
from iha.call import Call


def instead(call: Call) -> str:
    """The name, in quotes, of a backend on any device for what `flash` and `flex` refuse."""
    if call.window is not None:
        return "'local'"
    return "'sdpa'" if sdpa.refusal(call) is None else "'chunked'"
