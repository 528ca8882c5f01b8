"""IHA and its baselines behind one interface: any transformers model, any attention.

equipping.py        what a config is, and how a model gets its attention
baseline.py         what a baseline is: one layer's attention
multi_head.py, interleaved.py                       plain attention, and IHA
composable.py, differential.py, differential_v2.py, explicit.py, gated.py, knocking_heads.py,
local_global.py, multi_token.py, paired_heads.py, simplicial.py, talking_heads.py
cost.py             parameters and FLOPs, and models matched by either
"""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from iha_lab.baselines.baseline import Baseline
from iha_lab.baselines.composable import ComposableConfig
from iha_lab.baselines.cost import Cost, cost, matched
from iha_lab.baselines.differential import DifferentialConfig
from iha_lab.baselines.differential_v2 import DifferentialV2Config
from iha_lab.baselines.equipping import AttentionConfig
from iha_lab.baselines.explicit import ExplicitConfig
from iha_lab.baselines.gated import GatedConfig
from iha_lab.baselines.interleaved import InterleavedConfig
from iha_lab.baselines.knocking_heads import KnockingHeadsConfig
from iha_lab.baselines.local_global import LocalGlobalConfig
from iha_lab.baselines.multi_head import MultiHeadConfig
from iha_lab.baselines.multi_token import MultiTokenConfig
from iha_lab.baselines.paired_heads import PairedHeadsConfig
from iha_lab.baselines.simplicial import SimplicialConfig
from iha_lab.baselines.talking_heads import TalkingHeadsConfig

AnyAttention = Annotated[
    MultiHeadConfig
    | LocalGlobalConfig
    | PairedHeadsConfig
    | TalkingHeadsConfig
    | DifferentialConfig
    | DifferentialV2Config
    | GatedConfig
    | MultiTokenConfig
    | ComposableConfig
    | ExplicitConfig
    | KnockingHeadsConfig
    | SimplicialConfig
    | InterleavedConfig,
    pydantic.Field(discriminator="kind"),
]


def equip(model: Any, attention: AttentionConfig, seq_len: int | None = None) -> Any:
    """Give a Hugging Face model the attention that a config names, in place; return it.

    "mha" leaves the model alone, "iha" is `iha.upcycle`. For the others every attention module
    that changes gets a `Baseline` as `module.baseline`, whose parameters are the model's from then
    on, and the model calls one attention function for all of them. Another number of heads is for
    the config that the model is built from: `attention.configure(config)`.

    A baseline is saved in the state dict alone: to load one, build the plain model from its config,
    equip it with the same attention, and load the state dict.

    Args:
        model: any model whose attention goes through transformers' attention interface.
        attention: one of the configs of this package.
        seq_len: N, for `iha` with `schedule=True`, whose windows follow from it.

    Raises:
        ValueError: the model has another attention already, or something that the baseline lacks.
    """
    return attention.equip(model, seq_len)


__all__ = [
    "AnyAttention", "AttentionConfig", "Baseline", "ComposableConfig", "Cost",
    "DifferentialConfig", "DifferentialV2Config", "ExplicitConfig", "GatedConfig",
    "InterleavedConfig", "KnockingHeadsConfig", "LocalGlobalConfig", "MultiHeadConfig",
    "MultiTokenConfig", "PairedHeadsConfig", "SimplicialConfig", "TalkingHeadsConfig", "cost",
    "equip", "matched",
]  # fmt: skip
