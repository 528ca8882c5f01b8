"""The class of an upcycled model: transformers' own, with two things that saving and loading need.

`model.__class__` becomes a subclass of the same name that lives, for Python, in `modeling_iha.py`:
so `save_pretrained` copies that one file and names it in `auto_map`, by transformers' own means.
"""

from __future__ import annotations

import functools
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils.output_capturing import (
    _CAN_RECORD_REGISTRY,  # pyright: ignore[reportPrivateUsage]
)

from iha.modules import HeadMixing

MODULE = "iha.hf.modeling_iha"

# Where a class is listed under several auto classes, the first of these is its own.
_PREFERRED = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")


@functools.cache
def edition_of(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The IHA edition of a transformers model class."""
    if base.__module__ == MODULE:
        return base

    def _init_weights(self: Any, module: nn.Module) -> None:
        """Tensors that a checkpoint lacks start from `init`, not from memory's leftovers."""
        if not isinstance(module, HeadMixing):
            base._init_weights(self, module)  # pyright: ignore[reportPrivateUsage]
        elif not any(getattr(p, "_is_hf_initialized", False) for p in module.parameters()):
            module.reset_parameters()

    members = {
        "__module__": MODULE,
        "__doc__": base.__doc__,
        "_auto_class": next(iter(auto_classes(base.__name__)), None),
        "_init_weights": _init_weights,
    }
    edition = type(base.__name__, (base,), members)
    # transformers looks up by class what `output_hidden_states` collects, and writes it down only
    # for the class with which a model was built.
    # dict.__setitem__, since the registry's own takes a model from transformers 5.23 on.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(edition), base._can_record_outputs)  # pyright: ignore[reportPrivateUsage]
    return edition


def model_class(name: str) -> type[PreTrainedModel]:
    """The IHA edition of `transformers.NAME`."""
    base = getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise AttributeError(f"transformers has no model class {name!r}")
    return edition_of(base)


@functools.cache
def auto_classes(name: str) -> tuple[str, ...]:
    """The auto classes (AutoModelForCausalLM, …) through which transformers finds a model class."""
    found: list[str] = []
    for auto_name, auto in vars(modeling_auto).items():
        mapping = getattr(getattr(auto, "_model_mapping", None), "_model_mapping", None)
        if auto_name.startswith("Auto") and mapping is not None:
            listed = (n if isinstance(n, tuple) else (n,) for n in mapping.values())
            if any(name in names for names in listed):
                found.append(auto_name)
    rank = {auto: i for i, auto in enumerate(_PREFERRED)}
    return tuple(sorted(found, key=lambda auto: rank.get(auto, len(rank))))
