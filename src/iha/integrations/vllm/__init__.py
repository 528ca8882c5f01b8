"""Serves upcycled models with vLLM: an entry point of `vllm.general_plugins`.

vLLM calls `register` in every process that it starts. After `pip install
'interleaved-head-attention[vllm]'`, `vllm serve FOLDER` and `vllm.LLM(FOLDER)` work with no flag.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

ARCHITECTURE = "InterleavedHeadAttentionForCausalLM"
OLDEST, NEWEST = (0, 31), (0, 32)


def register() -> None:
    """Tell vLLM the class that serves IHA, and which checkpoints are IHA's."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import get_config_parser, register_config_parser

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    parser: Any = type(get_config_parser("hf"))  # vLLM's own, or another plugin's
    if getattr(parser, "names_iha", False):
        return

    class ConfigParser(parser):
        """A checkpoint whose config has the entry `iha` is ours, whatever class name it carries.

        `save_pretrained` writes transformers' own class name. vLLM has models of its own under
        these names, which know no mixing tensors and refuse them when they load the weights.
        """

        names_iha = True

        def parse(self, *arguments: Any, **keywords: Any) -> tuple[dict[str, Any], Any]:
            config_dict, config = super().parse(*arguments, **keywords)
            if getattr(config, "iha", None) is not None:
                check_version()
                # The first that is registered is taken; vLLM reads the others for weight names.
                config.architectures = [ARCHITECTURE, *(config.architectures or ())]
            return config_dict, config

    register_config_parser("hf")(ConfigParser)


def check_version() -> None:
    """Raise where vLLM is none of the tested versions."""
    found = _vllm_version()
    if not OLDEST <= found[:2] <= NEWEST:
        oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
        raise ValueError(
            f"vLLM {'.'.join(map(str, found))} is not one that serves IHA; install a version from"
            f" {oldest} to {newest}."
        )


def _vllm_version() -> tuple[int, ...]:
    import vllm

    version = getattr(vllm, "__version__", None) or importlib.metadata.version("vllm")
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
