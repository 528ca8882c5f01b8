"""What an upcycled model is to transformers: its own class, plus what saving and loading need.

`model.__class__` becomes a subclass of the same name, its IHA edition, that lives, for Python, in
`modeling_iha.py`: so `save_pretrained` copies that one file and names it in `auto_map`, by
transformers' own means, and `trust_remote_code=True` builds an edition.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils.output_capturing import (
    _CAN_RECORD_REGISTRY,  # pyright: ignore[reportPrivateUsage]
)

from iha.hf.attaching import attach, gather_heads, parts
from iha.hf.attention import ENGINES, NAME, SAVED_NAME
from iha.hf.card import write_card
from iha.hf.entry import Entry
from iha.modules import HeadMixing

MODULE = "iha.hf.modeling_iha"

# Where a class is listed under several auto classes, the first of these is its own.
_PREFERRED = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")


def restore(model: Any, **noise: float) -> None:
    """Attach what `model.config.iha` describes, and what the configs of its parts describe."""
    described = [(part, entry) for part in parts(model) if (entry := Entry.read(part.config))]
    for part, entry in described:
        attach(part, entry, **noise)
        if part.config._attn_implementation not in ENGINES:  # pyright: ignore[reportPrivateUsage]
            part.set_attn_implementation(NAME)
        mark(part)
    if described:
        mark(model)


def mark(model: Any) -> None:
    """Make `model` what is saved as an IHA model: of an edition's class, with what that needs.

    A model around one that was upcycled by itself is marked too, when it is saved or loaded.
    """
    config: Any = model.config
    for inner in parts(model):
        private: Any = inner.config
        if private._attn_implementation == SAVED_NAME:
            private._attn_implementation_internal = NAME
    # What save_pretrained writes. A program that does not know the first builds no such model, and
    # one that names an attn_implementation of its own still knows no such fusion and loads none.
    config.attn_implementation = {"": SAVED_NAME}  # not sub-configs
    config.fusion_config = {**(getattr(config, "fusion_config", None) or {}), SAVED_NAME: False}
    # The base model too, which may be saved by itself.
    for one in (model.base_model, model):
        one.__class__ = edition_of(type(one))
        gather_heads(one)
        # Loaded as float32, whatever the dtype of the model.
        wide: Any = one._keep_in_fp32_modules_strict or ()  # pyright: ignore[reportPrivateUsage]
        one._keep_in_fp32_modules_strict = {*wide, "head_mixing"}  # type: ignore[assignment]
    if type(model).__module__ == MODULE:
        config.auto_map = {
            auto: f"modeling_iha.{name}" for auto, name in auto_classes(config).items()
        }


# For type checkers: what an edition stands in front of.
_Base: Any = PreTrainedModel if TYPE_CHECKING else object


class Edition(_Base):
    """What goes in front of a model class of transformers, or of a custom one."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        restore(self)

    @classmethod
    def from_pretrained(cls: Any, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        return super().from_pretrained(path, *args, config=_own_config(cls, config), **kwargs)  # type: ignore[misc]

    @classmethod
    def _from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
        return super()._from_config(_own_config(cls, config), **kwargs)  # type: ignore[misc]

    @classmethod
    def is_custom_code(cls: Any) -> bool:
        """As the class behind it, whose checkpoints transformers converts as they are loaded."""
        return cls.__mro__[cls.__mro__.index(Edition) + 1].is_custom_code()

    def _init_weights(self, module: nn.Module) -> None:
        """Tensors that a checkpoint lacks start from `init`, not from memory's leftovers."""
        if not isinstance(module, HeadMixing):
            super()._init_weights(module)  # type: ignore[misc]
        elif not any(getattr(p, "_is_hf_initialized", False) for p in module.parameters()):
            module.reset_parameters()


@functools.cache
def edition_of(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The IHA edition of a model class.

    A custom class stays in its own file, which `save_pretrained` goes on copying where it did.
    """
    if issubclass(base, Edition):
        return base
    members: dict[str, Any] = {"__module__": base.__module__, "__doc__": base.__doc__}
    if base.__module__.startswith("transformers."):
        members |= {
            "__module__": MODULE,
            "_auto_class": next(iter(_auto_classes_of(base.__name__)), None),
        }
    edition = type(base.__name__, (Edition, base), members)
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


def auto_classes(config: Any) -> dict[str, str]:
    """Each auto class that can load a model of this config → the model class that it takes."""
    found: dict[str, str] = {}
    for auto, names in _mappings():
        listed = names.get(config.model_type)
        if listed:
            own = [name for name in listed if name in (config.architectures or ())]
            found[auto] = (own or listed)[0]
    return found


@functools.cache
def _auto_classes_of(name: str) -> tuple[str, ...]:
    """The auto classes under which transformers lists a model class."""
    found = [
        auto for auto, names in _mappings() if any(name in listed for listed in names.values())
    ]
    rank = {auto: i for i, auto in enumerate(_PREFERRED)}
    return tuple(sorted(found, key=lambda auto: rank.get(auto, len(rank))))


@functools.cache
def _mappings() -> list[tuple[str, dict[str, tuple[str, ...]]]]:
    """(auto class, model type → names of model classes), as transformers has them."""
    found: list[tuple[str, dict[str, tuple[str, ...]]]] = []
    for auto_name, auto in vars(modeling_auto).items():
        mapping = getattr(getattr(auto, "_model_mapping", None), "_model_mapping", None)
        if auto_name.startswith("Auto") and mapping is not None:
            names = {k: v if isinstance(v, tuple) else (v,) for k, v in mapping.items()}
            found.append((auto_name, names))
    return found


def _own_config(cls: Any, config: Any) -> Any:
    """The text config where the class is of the text model alone, as auto classes choose it."""
    if isinstance(config, transformers.PreTrainedConfig) and cls.config_class is not None:
        text = config.get_text_config()
        if not isinstance(config, cls.config_class) and isinstance(text, cls.config_class):
            return text
    return config


def restore_whatever_is_built() -> None:
    """Let every model that transformers builds look into its config for the entry `iha`.

    transformers has no hook for this: the attention registry is not told of the model, and its
    registry of classes to replace goes by their names alone. So this is the one place that changes
    something of its. A checkpoint with mixing tensors that found no place is no mere note then, and
    a model around one that was upcycled by itself learns of it before it is saved.
    """
    build = PreTrainedModel.post_init
    if getattr(build, "restores_iha", False):
        return

    save = PreTrainedModel.save_pretrained
    adjust: Any = PreTrainedModel._adjust_missing_and_unexpected_keys  # pyright: ignore[reportPrivateUsage]

    @functools.wraps(build)
    def post_init(self: Any) -> None:
        build(self)
        restore(self)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        interleaved = any(Entry.read(part.config) for part in parts(self))
        if interleaved:
            mark(self)
        save(self, save_directory, *args, **kwargs)
        if interleaved and (*args, kwargs.get("is_main_process", True))[0]:
            write_card(self, Path(save_directory))

    @functools.wraps(adjust)
    def adjust_keys(self: Any, loading_info: Any) -> None:
        adjust(self, loading_info)
        for key, found, expected in loading_info.mismatched_keys:
            if ".head_mixing." in key:
                loading_info.mismatched_keys.clear()  # else transformers' own report is the error
                raise ValueError(
                    f"the checkpoint's {key!r} has the shape {tuple(found)}, and the entry 'iha' of"
                    f" config.json makes it {tuple(expected)} (pseudo_heads, pseudo_queries,"
                    " per_head_collapse); restore the file."
                )
        modules = dict(self.named_modules())
        for key in loading_info.unexpected_keys:
            path, found, _ = key.partition(".head_mixing.")
            if found and path in modules:
                raise ValueError(
                    f"the checkpoint has mixing tensors of {path!r}, which the entry 'iha' of"
                    " config.json does not name, or there is none; restore the file."
                )

    post_init.restores_iha = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init
    PreTrainedModel.save_pretrained = save_pretrained
    PreTrainedModel._adjust_missing_and_unexpected_keys = adjust_keys  # pyright: ignore[reportPrivateUsage]
