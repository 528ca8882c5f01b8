"""Interleaved Head Attention: heads that talk before the softmax.

The operator        `interleaved_head_attention`, `explain_backend`, `BACKENDS`
Modules             `HeadMixing` (four small tensors), `InterleavedHeadAttention` (a whole layer),
                    `KeyValueCache`
Optimizers          `parameter_groups`, `mixing_parameters`, `check_optimizers`
Positions, windows  `rotary_tables`, `phase_tables`, `inverse_frequencies`, `window_from_flash`
Schedules           `hybrid_schedule`, `attention_flops`
Where heads look    `attention_patterns`, `AttentionPattern`
Context parallelism `window_halo`
Hugging Face        `upcycle`, `drop_unread_queries`; `import iha.hf` registers everything

`import iha` needs torch alone; `attention_patterns` and the last line's names
import transformers when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iha.backends import BACKENDS
from iha.backends.context_parallel import window_halo
from iha.dispatch import BackendChoice, explain_backend
from iha.modules import HeadMixing, InterleavedHeadAttention, KeyValueCache
from iha.operator import interleaved_head_attention
from iha.parameters import check_optimizers, mixing_parameters, parameter_groups
from iha.patterns import AttentionPattern
from iha.rotary import inverse_frequencies, phase_tables, rotary_tables
from iha.schedule import attention_flops, hybrid_schedule
from iha.visibility import window_from_flash

if TYPE_CHECKING:
    from iha.hf import attention_patterns, drop_unread_queries, upcycle

__version__ = "0.1.0"
__all__ = [
    "BACKENDS",
    "AttentionPattern",
    "BackendChoice",
    "HeadMixing",
    "InterleavedHeadAttention",
    "KeyValueCache",
    "attention_flops",
    "attention_patterns",
    "check_optimizers",
    "drop_unread_queries",
    "explain_backend",
    "hybrid_schedule",
    "interleaved_head_attention",
    "inverse_frequencies",
    "mixing_parameters",
    "parameter_groups",
    "phase_tables",
    "rotary_tables",
    "upcycle",
    "window_from_flash",
    "window_halo",
]


def __getattr__(name: str) -> object:
    if name in ("attention_patterns", "drop_unread_queries", "upcycle"):
        import iha.hf

        return getattr(iha.hf, name)
    raise AttributeError(f"module 'iha' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
