"""What a model costs, and a width at which it costs what the plain one does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import iha
from iha.hf.attention_modules import AttentionLayer, attention_layers
from iha_lab.baselines.baseline import head_dim, plain_flops
from iha_lab.baselines.equipping import AttentionConfig
from iha_lab.baselines.multi_head import MultiHeadConfig


@dataclasses.dataclass(frozen=True)
class Cost:
    """Parameters, and forward FLOPs of one sequence with a multiply-add counted as 2.

    `extra_parameters` of `parameters` are those that the plain model does not have.
    `attention_flops` of `total_flops` are those of the attentions' definitions, mixing included.
    """

    parameters: int
    extra_parameters: int
    attention_flops: int
    total_flops: int

    def as_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)


def cost(model: Any, seq_len: int) -> Cost:
    """Count a model, equipped or plain, on any device ("meta" too), for N = `seq_len` tokens.

    FLOPs besides attention are 2 for each weight of a linear layer and token, output head
    included, as in a dense model; embeddings, norms and activations are not counted.
    """
    layers = attention_layers(model)
    extra = (
        parameter.numel()
        for layer in layers
        for name in ("baseline", "head_mixing")
        for parameter in getattr(layer.module, name, nn.Module()).parameters()
    )
    attention = sum(_attention_flops(layer, seq_len) for layer in layers)
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
    )
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        extra_parameters=sum(extra),
        attention_flops=attention,
        total_flops=attention + 2 * seq_len * linear,
    )


def _attention_flops(layer: AttentionLayer, seq_len: int) -> int:
    module: Any = layer.module
    H, causal = layer.num_heads, layer.causal
    baseline: Any = getattr(module, "baseline", None)
    if baseline is not None:
        return baseline.flops(seq_len, causal)
    window, d = getattr(module, "sliding_window", None), head_dim(layer)
    settings: Any = getattr(module, "iha", None)
    if settings is None:
        return plain_flops(seq_len, H, d, causal, window)
    windows = [w for w in (window, settings.window) if w is not None and causal]
    P, Pq, G = settings.pseudo_heads, module.head_mixing.pseudo_queries, layer.num_kv_heads
    window = min(windows, default=None)
    flops = iha.attention_flops(seq_len, H, d, P, pseudo_queries=Pq, num_kv_heads=G, window=window)
    if P == 1:  # which iha takes for plain attention
        flops += 4 * seq_len * d * (H**2 + G**2)
    if module.head_mixing.per_head_collapse:
        flops -= 2 * seq_len * d * (H**2 - H) * Pq
    # Without causality, the other half of the pairs too.
    virtual = seq_len**2 * Pq * P
    return flops if causal else flops + 4 * H * d * (virtual - virtual // 2)


def matched(
    make_model: Callable[[Any], Any],
    config: Any,
    attention: AttentionConfig,
    seq_len: int,
    by: Literal["parameters", "flops"] = "parameters",
) -> tuple[Any, float]:
    """Change the MLPs' width in a config so that `attention` costs what the plain model does.

    `make_model(config)` builds the plain model, such as `LlamaForCausalLM`; here on the meta
    device. `by` chooses parameters or total forward FLOPs of `seq_len` tokens. Both are linear in
    `intermediate_size`, so the best width is computed, not searched.

    Returns:
        (a changed copy of `config`, which `attention` has configured too,
        how far off it is: matched / plain − 1).

    Raises:
        ValueError: no width is small enough, or the config has no `intermediate_size`.
    """
    width = getattr(config, "intermediate_size", None)
    if not isinstance(width, int):
        raise ValueError(f"config ({type(config).__name__}) has no intermediate_size to change.")

    def at(width: int, attention: AttentionConfig) -> tuple[Any, int]:
        changed = copy.deepcopy(config)
        changed.intermediate_size = width
        changed = attention.configure(changed)
        with torch.device("meta"):
            model = make_model(copy.deepcopy(changed))
        found = cost(attention.equip(model, seq_len), seq_len)
        return changed, found.parameters if by == "parameters" else found.total_flops

    _, plain = at(width, MultiHeadConfig())
    _, here = at(width, attention)
    _, further = at(width + 1, attention)
    best = width + round((plain - here) / (further - here))
    if best < 1:
        raise ValueError(
            f"{attention.label} has more {by} than the plain model with MLPs of any width; take"
            f" {'a shorter seq_len or ' if by == 'flops' else ''}a wider model."
        )
    changed, found = at(best, attention)
    return changed, found / plain - 1
