"""An upcycled model in vLLM: its Transformers modelling backend, with IHA's attention layers.

transformers builds the model from the config, and `iha.hf` attaches the mixing tensors while it is
built. So vLLM finds them in the module tree and loads them by their names in the checkpoint.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM

import iha.hf as iha_hf  # noqa: F401  # registers what builds the model
from iha.integrations.vllm.attention import InterleavedHeadAttention


class InterleavedHeadAttentionForCausalLM(TransformersForCausalLM):
    """A causal language model with IHA in some of its layers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            raise ValueError(
                "IHA mixes all heads of a layer, which tensor parallelism spreads over devices; use"
                " tensor_parallel_size=1, with data or pipeline parallelism for more devices."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @functools.cached_property
    def _pre_trained_model_classes(self) -> Any:
        """transformers' own decoder class: the constructor of the IHA edition never runs."""
        classes = super()._pre_trained_model_classes
        own = (cls for cls in classes.decoder.__mro__ if not cls.__module__.startswith("iha."))
        return classes._replace(decoder=next(own))

    def _get_attn_cls(self) -> Any:
        """IHA's layer where its module carries a mixing, vLLM's own elsewhere."""
        plain = super()._get_attn_cls()
        if plain is not Attention:
            raise ValueError(
                f"vLLM serves this model with {plain.__name__}, which IHA does not have; it serves"
                " decoders with key and value heads."
            )

        def attention(*, prefix: str, **arguments: Any) -> Attention:
            module = self.get_submodule(prefix.rpartition(".")[0])
            if not hasattr(module, "head_mixing"):
                return plain(prefix=prefix, **arguments)
            return InterleavedHeadAttention(module, prefix=prefix, **arguments)

        return attention
