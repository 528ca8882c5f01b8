"""Interleaved Head Attention."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

import iha
from iha.hf.attention_modules import attention_layers
from iha_lab.baselines.equipping import AttentionConfig


class InterleavedConfig(AttentionConfig):
    """Interleaved Head Attention (Duvvuri et al., arXiv 2602.21371), by `iha.upcycle`.

    `init` is as in `iha.HeadMixing`: "scratch" to train from nothing, "upcycle" for the exact
    start. `schedule` limits it to `iha.hybrid_schedule`'s layers and windows, which matches FLOPs.
    """

    kind: Literal["iha"] = "iha"
    pseudo_heads: int = pydantic.Field(4, ge=1)
    rope: Literal["virtual", "token", "fractional"] = "virtual"
    collapse: Literal["full", "per-head"] = "full"
    init: Literal["scratch", "upcycle", "identity"] = "scratch"
    schedule: bool = False

    @property
    def label(self) -> str:
        parts = [f"iha-p{self.pseudo_heads}"]
        parts += [self.rope] if self.rope != "virtual" else []
        parts += ["per-head"] if self.collapse == "per-head" else []
        parts += [self.init] if self.init != "scratch" else []
        parts += ["schedule"] if self.schedule else []
        return "-".join(parts)

    def equip(self, model: Any, seq_len: int | None) -> Any:
        where: dict[str, Any] = {}
        if self.schedule:
            if seq_len is None:
                raise ValueError(
                    "seq_len must be given for iha with schedule=True: windows follow it."
                )
            if not all(layer.causal for layer in attention_layers(model)):
                raise ValueError(
                    f"schedule=True has windows for causal layers, and {type(model).__name__} has"
                    " others; set schedule=False."
                )
            layers = model.config.num_hidden_layers
            schedule = iha.hybrid_schedule(layers, seq_len, self.pseudo_heads)
            where = {"layers": schedule.layers, "window": schedule.window}
        return iha.upcycle(
            model,
            self.pseudo_heads,
            rope=self.rope,
            init=self.init,
            per_head_collapse=self.collapse == "per-head",
            **where,
        )
