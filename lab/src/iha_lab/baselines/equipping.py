"""Give a model the attention that a config names, through transformers' attention interface."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import pydantic
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from iha.hf.attention import autocast
from iha.hf.attention_modules import AttentionLayer, attention_layers
from iha.hf.masks import Made, iha_mask, visible_tokens
from iha_lab.baselines.baseline import Baseline, Inputs

NAME = "iha-baseline"

# What a model may pass that changes the function and that no baseline has.
_FOREIGN = {
    "softcap": "a soft cap of the logits",
    "s_aux": "attention sinks",
    "position_bias": "an additive position bias",
    "cache": "transformers' continuous batching cache",
}


class AttentionConfig(pydantic.BaseModel, abc.ABC):
    """Which attention a model gets: the typed part of every experiment's config."""

    model_config: ClassVar = pydantic.ConfigDict(extra="forbid", frozen=True)

    @property
    def label(self) -> str:
        """The name in tables and file names."""
        return self.kind  # type: ignore[attr-defined]

    def configure(self, config: Any) -> Any:
        """Return the transformers config of a model that is to have this attention.

        Most change nothing there; one that does changes a copy.
        """
        return config

    @abc.abstractmethod
    def equip(self, model: Any, seq_len: int | None) -> Any:
        """Change the model in place; `iha_lab.baselines.equip` says how."""


class BaselineConfig(AttentionConfig):
    """A baseline: every layer that changes gets a module of its own."""

    @abc.abstractmethod
    def build(self, layer: AttentionLayer) -> Baseline | None:
        """Make the layer's baseline; None where the layer keeps its own attention."""

    def equip(self, model: Any, seq_len: int | None) -> Any:
        layers = attention_layers(model)
        if getattr(model.config, "iha", None) is not None or any(
            hasattr(layer.module, "baseline") for layer in layers
        ):
            raise ValueError("model has another attention already; equip a plain one.")
        if not model._supports_sdpa:
            raise ValueError(
                f"model ({type(model).__name__}) is not one that transformers runs with SDPA, whose"
                " way with masks the baselines share; use an architecture that it does."
            )
        for layer in layers:
            if (why_not := layer.refusal()) is not None:
                raise ValueError(
                    f"layer {layer.name!r} ({type(layer.module).__name__}) cannot have another"
                    f" attention: {why_not}; take another model."
                )
        # All are built before the first is attached: a refusal leaves the model as it was.
        built = [self.build(layer) for layer in layers]
        for layer, baseline in zip(layers, built, strict=True):
            if baseline is not None:
                _attach(layer, baseline)
        model.set_attn_implementation(NAME)
        return model


def _attach(layer: AttentionLayer, baseline: Baseline) -> None:
    like = next(p for p in layer.module.parameters() if p.is_floating_point())
    layer.module.baseline = baseline.to(device=like.device, dtype=like.dtype)
    baseline.attach(layer)
    layer.module.register_forward_pre_hook(_refuse_other_attention)


def _refuse_other_attention(module: Any, args: object) -> None:
    if module.config._attn_implementation != NAME:
        raise ValueError(
            f"the model's attention was set to {module.config._attn_implementation!r}, which would"
            f" leave its baseline out; call model.set_attn_implementation({NAME!r})."
        )


def baseline_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend in one layer: by its baseline where it has one, else by its own attention."""
    for name, what in _FOREIGN.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name} ({what}), which the baselines do not have;"
                " take another model."
            )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    visible, offset = None, None
    if attention_mask is not None:
        visible = visible_tokens(attention_mask, query.shape[2])
        made: Made | None = getattr(attention_mask, "iha", None)
        offset = None if made is None else made.offset
    baseline: Any = getattr(module, "baseline", None)
    if baseline is None:
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, visible, **options)
    if dropout:
        raise ValueError(
            f"the model drops attention weights (p = {dropout}), which the baselines' papers do not"
            " define; set attention_dropout (or attention_probs_dropout_prob) to 0 in its config."
        )
    if attention_mask is None and is_causal and query.shape[2] > 1:
        offset = 0  # transformers leaves the mask out only where the cache was empty before
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = autocast(query, key, value)
    out = baseline(Inputs(query, key, value, visible, is_causal, scale, offset))
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, baseline_attention)
# IHA's, which is transformers' own and says where the queries stand, as windows need to know.
AttentionMaskInterface.register(NAME, iha_mask)
