"""IHA as a method of PEFT: an adapter that is the mixing tensors, and nothing else.

    import iha.integrations.peft as iha_peft  # registers the method; needed before loading, too

    model = get_peft_model(base, iha_peft.IhaConfig(pseudo_heads=4, task_type="CAUSAL_LM"))
    ...  # train; only the mixing tensors do
    model.save_pretrained("adapter")  # they alone: 4·H²·P + … numbers per layer
    model = PeftModel.from_pretrained(base, "adapter")
    model.merge_and_unload().save_pretrained("whole")  # an ordinary IHA folder, to be served

Switched off, the model is exactly its base. Written for PEFT 0.21, whose tuner classes it extends.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn

from iha.call import Causality
from iha.hf import upcycle
from iha.modules import HeadMixing
from iha.rotary import RopeMode

_METHOD = "IHA"


@dataclasses.dataclass
class IhaConfig(PeftConfig):
    """What `iha.upcycle` is told; its docstring says what each means.

    The adapter switched off must be the base model, so what would change the base model's own
    attention is no part of it: `rope="virtual"` and `window`.
    """

    pseudo_heads: int | dict[Any, int] = 2
    layers: list[int | str] | None = None
    pseudo_queries: int | dict[Any, int] | None = None
    rope: RopeMode = "token"
    causal: Causality = "flat"
    per_head_collapse: bool = False
    value_noise: float = 0.1
    query_noise: float = 0.1
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(_METHOD)
        if self.rope == "virtual":
            raise ValueError(
                "rope must be 'token' or 'fractional' in an adapter, got 'virtual', which stretches"
                " the base model's own positions; use iha.upcycle for it."
            )
        for name in ("pseudo_heads", "pseudo_queries"):
            if isinstance(sizes := getattr(self, name), dict):  # JSON knows only keys of text
                numbered = {int(k) if str(k).isdecimal() else k: v for k, v in sizes.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
                setattr(self, name, numbered)


class IhaLayer(nn.Module, BaseTunerLayer):
    """A layer's `head_mixing` while it is an adapter: its own, or that of no mixing at all."""

    adapter_layer_names = ("mixing_of",)

    def __init__(self, mixing: HeadMixing, adapter_name: str) -> None:
        super().__init__()
        self.mixing_of = nn.ModuleDict({adapter_name: mixing})
        # P = 1 starts as the identity: plain attention.
        self.base_layer = HeadMixing(
            mixing.num_heads,
            num_kv_heads=mixing.num_kv_heads,
            pseudo_heads=1,
            init="identity",
            device=mixing.alpha_q.device,
            dtype=mixing.alpha_q.dtype,
        ).requires_grad_(False)

    def forward(self, *base: Tensor, phase: Any = None, **arguments: Any) -> Tensor:
        if self.disable_adapters or not self.active_adapters:
            return self.base_layer(*base, **arguments)
        return self.mixing_of[self.active_adapters[0]](*base, phase=phase, **arguments)


class IhaModel(BaseTuner):
    """Upcycles the model that PEFT gives it, and makes the mixing tensors its adapter."""

    prefix = "mixing_"
    tuner_layer_cls = IhaLayer

    def inject_adapter(
        self,
        model: Any,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Any = None,
    ) -> None:
        if len(self.peft_config) > 1:
            raise ValueError(
                "a model takes one IHA adapter, and it has one already; load the base model again"
                " for another. LoRA beside IHA: iha.upcycle, then LoraConfig with"
                " modules_to_save=['head_mixing']."
            )
        config, name = self.peft_config[adapter_name], model.config.name_or_path
        upcycle(model, **{key: getattr(config, key) for key in IhaConfig.__annotations__})
        # An adapter's base is the plain one; what is merged is no longer to be had by that name.
        self.merged_name = model.config.name_or_path
        model.config.name_or_path = model.name_or_path = name
        for path, module in list(model.named_modules()):
            if isinstance(module, HeadMixing):
                parent = model.get_submodule(path.rpartition(".")[0])
                parent.head_mixing = IhaLayer(module, adapter_name)
                self.targeted_module_names.append(path)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("inject_adapter replaces what the config names by itself.")

    def _unload_and_optionally_merge(self, merge: bool = True, *_: Any, **__: Any) -> Any:
        if not merge:
            raise ValueError("unload is not possible for IHA: load the base model again instead.")
        for module in list(self.model.modules()):
            layer = getattr(module, "head_mixing", None)
            if isinstance(layer, IhaLayer):
                module.head_mixing = layer.mixing_of[layer.active_adapters[0]]
        self.model.config.name_or_path = self.model.name_or_path = self.merged_name
        del self.model.peft_config
        return self.model


if _METHOD not in PeftType.__members__:
    # PEFT's list of methods is an Enum, which has no way for others to add to it.
    member: Any = str.__new__(PeftType, _METHOD)
    member._name_ = member._value_ = _METHOD
    PeftType._member_map_[_METHOD] = PeftType._value2member_map_[_METHOD] = member
    PeftType._member_names_.append(_METHOD)
    register_peft_method(
        name="iha", config_cls=IhaConfig, model_cls=IhaModel, prefix=IhaModel.prefix
    )
