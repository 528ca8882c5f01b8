"""Plain attention."""

from __future__ import annotations

from typing import Any, Literal

from iha_lab.baselines.equipping import AttentionConfig


class MultiHeadConfig(AttentionConfig):
    """Multi-head attention, global in every layer (Vaswani et al., arXiv 1706.03762)."""

    kind: Literal["mha"] = "mha"

    def equip(self, model: Any, seq_len: int | None) -> Any:
        return model
