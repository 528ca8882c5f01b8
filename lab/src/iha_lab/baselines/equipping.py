"""Give a model the attention of a choice."""

from __future__ import annotations

from typing import Any

import iha
from iha.hf.attention_modules import AttentionLayer, attention_layers
from iha_lab.baselines import choices
from iha_lab.baselines.attention import NAME
from iha_lab.baselines.choices import Choice
from iha_lab.baselines.differential import Differential
from iha_lab.baselines.knocking_heads import KnockingHeads
from iha_lab.baselines.layers import head_dim, projection
from iha_lab.baselines.local_global import Window
from iha_lab.baselines.rival import Rival
from iha_lab.baselines.simplicial import Simplicial
from iha_lab.baselines.talking_heads import TalkingHeads


def equip(model: Any, choice: Choice, seq_len: int | None = None) -> Any:
    """Give a Hugging Face model the attention that `choice` names, in place; return it.

    "mha" leaves the model alone, "iha" is `iha.upcycle`. For the others every attention module
    that changes gets a `Rival` as `module.rival`, whose parameters are the model's from then on,
    and the model calls one attention function for all of them.

    A rival is saved in the state dict alone: to load one, build the plain model from its config,
    equip it with the same choice, and load the state dict.

    Args:
        model: any model whose attention goes through transformers' attention interface.
        choice: one of `choices`.
        seq_len: N, for `iha` with `schedule=True`, whose windows follow from it.

    Raises:
        ValueError: the model has a rival or IHA already, or something that the rival lacks.
    """
    if isinstance(choice, choices.Plain):
        return model
    if isinstance(choice, choices.Interleaved):
        return _interleave(model, choice, seq_len)
    layers = attention_layers(model)
    if getattr(model.config, "iha", None) is not None or any(
        hasattr(layer.module, "rival") for layer in layers
    ):
        raise ValueError("model has another attention already; equip a plain one.")
    if not model._supports_sdpa:
        raise ValueError(
            f"model ({type(model).__name__}) is not one that transformers runs with SDPA, whose way"
            " with masks the rivals share; use an architecture that it does."
        )
    # All are built before the first is attached: a refusal leaves the model as it was.
    rivals = [_rival(choice, layer) for layer in layers]
    for layer, rival in zip(layers, rivals, strict=True):
        if rival is not None:
            _attach(layer, rival)
    model.set_attn_implementation(NAME)
    return model


def _interleave(model: Any, choice: choices.Interleaved, seq_len: int | None) -> Any:
    where: dict[str, Any] = {}
    if choice.schedule:
        if seq_len is None:
            raise ValueError("seq_len must be given for iha with schedule=True: windows follow it.")
        if not all(layer.causal for layer in attention_layers(model)):
            raise ValueError(
                f"schedule=True has windows for causal layers, and {type(model).__name__} has"
                " others; set schedule=False."
            )
        schedule = iha.hybrid_schedule(model.config.num_hidden_layers, seq_len, choice.pseudo_heads)
        where = {"layers": schedule.layers, "window": schedule.window}
    return iha.upcycle(
        model,
        choice.pseudo_heads,
        rope=choice.rope,
        init=choice.init,
        per_head_collapse=choice.collapse == "per-head",
        **where,
    )


def _rival(choice: Choice, layer: AttentionLayer) -> Rival | None:
    """The layer's rival; None where it keeps its own attention."""
    why_not = layer.refusal()
    if why_not is not None:
        raise ValueError(
            f"layer {layer.name!r} ({type(layer.module).__name__}) cannot have another attention:"
            f" {why_not}; take another model."
        )
    sizes = layer.num_heads, layer.num_kv_heads, head_dim(layer)
    index = layer.index or 0
    match choice:
        case choices.LocalGlobal():
            return None if index % 5 == 4 else Window(*sizes, choice.window)
        case choices.TalkingHeads():
            return TalkingHeads(*sizes)
        case choices.Differential():
            return Differential(*sizes, index)
        case choices.KnockingHeads():
            for which in ("query", "key", "value") if choice.queries_keys else ("value",):
                projection(layer, which)
            return KnockingHeads(*sizes, choice.values, choice.queries_keys)
        case choices.Simplicial():
            like = projection(layer, "key")
            config: Any = layer.module.config
            return Simplicial(
                *sizes,
                like.in_features,
                choice.windows,
                choice.biases,
                projection_bias=any(name == "bias" for name, _ in like.named_parameters()),
                std=getattr(config, "initializer_range", 0.02),
            )
        case _:
            raise ValueError(f"choice must be one of choices.KINDS, got {choice!r}.")


def _attach(layer: AttentionLayer, rival: Rival) -> None:
    like = next(p for p in layer.module.parameters() if p.is_floating_point())
    layer.module.rival = rival.to(device=like.device, dtype=like.dtype)
    rival.attach(layer)
    layer.module.register_forward_pre_hook(_refuse_other_attention)


def _refuse_other_attention(module: Any, args: object) -> None:
    if module.config._attn_implementation != NAME:
        raise ValueError(
            f"the model's attention was set to {module.config._attn_implementation!r}, which would"
            f" leave its rival out; call model.set_attn_implementation({NAME!r})."
        )
