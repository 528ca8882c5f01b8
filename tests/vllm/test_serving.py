"""vLLM, through the installed entry point, gives what transformers' own generate gives.

`make test-vllm` runs this in an environment of its own; elsewhere it is skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import iha.hf

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# name: class of the config, its further settings, arguments of upcycle
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}, {"pseudo_heads": 3}),
    "llama: P per layer": ("LlamaConfig", {}, {"pseudo_heads": {0: 2, 2: 4}, "rope": "fractional"}),
    "llama: virtual": ("LlamaConfig", {}, {"pseudo_heads": 2, "rope": "virtual"}),
    "llama: fewer pseudo-queries": ("LlamaConfig", {}, {"pseudo_heads": 4, "pseudo_queries": 2}),
    "llama: windows": ("LlamaConfig", {}, {"pseudo_heads": 3, "layers": [0, 1, 2], "window": 16}),
    "llama: token, window": (
        "LlamaConfig",
        {},
        {"pseudo_heads": 2, "causal": "token", "window": 9, "per_head_collapse": True},
    ),
    "qwen3": ("Qwen3Config", {}, {"pseudo_heads": 3, "rope": "fractional"}),
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": 24, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 20.0},
        {"pseudo_heads": 2, "layers": [0, 1, 2]},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 24}, {"pseudo_heads": 2}),
    "mistral: token": (
        "MistralConfig",
        {"sliding_window": 24},
        {"pseudo_heads": 2, "causal": "token"},
    ),
    "glm4": (
        "Glm4Config",
        {"partial_rotary_factor": 0.5},
        {"pseudo_heads": 2, "rope": "fractional"},
    ),
    "olmoe": (
        "OlmoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": None, "hidden_size": 256},
        {"pseudo_heads": 2},
    ),
    "smollm3": (
        "SmolLM3Config",
        {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False},
        {"pseudo_heads": 2, "rope": "fractional"},
    ),
    "phi3": ("Phi3Config", {"head_dim": None, "hidden_size": 256}, {"pseudo_heads": 2}),
    "cohere2": (
        "Cohere2Config",
        {"sliding_window": 24, "head_dim": 32},
        {"pseudo_heads": 2, "rope": "fractional"},
    ),
    "olmo2": ("Olmo2Config", {"head_dim": None, "hidden_size": 256}, {"pseudo_heads": 2}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.1}, {"pseudo_heads": 2}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 24}, {"pseudo_heads": 2}),
}
Prompts = list[list[int]]
NEW, LENGTHS = 24, (3, 17, 40, 100)
# A prompt is read in chunks, sequences share a step, and the second time prefixes are cached.
OPTIONS = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": 32,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 3,
    "enable_prefix_caching": True,
    "enforce_eager": True,
}


def saved(name: str, folder: Path, **changed: Any) -> Path:
    """A random model whose mixing tensors are those of a trained one."""
    config_class, changes, arguments = MODELS[name]
    settings = {k: v for k, v in {**SIZES, **changes, **changed}.items() if k != "head_dim" or v}
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        iha.upcycle(model, **arguments)
        for parameter in iha.mixing_parameters(model):
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def prompts(*lengths: int) -> Prompts:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(2, 512, (length,), generator=random).tolist() for length in lengths]


def by_transformers(folder: Path, asked: Prompts) -> list[tuple[list[int], list[float]]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = made.sequences[0, len(prompt) :].tolist()
        rows = [logits[0].log_softmax(-1) for logits in made.logits]
        found.append((tokens, [float(row[t]) for row, t in zip(rows, tokens, strict=True)]))
    return found


def by_vllm(folder: Path, asked: Prompts, times: int, **options: Any) -> list[list[dict[str, Any]]]:
    request = {
        "folder": str(folder),
        "options": OPTIONS | options,
        "prompts": asked,
        "new": NEW,
        "times": times,
    }
    script = Path(__file__).parent / "generate.py"
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(request), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    return [json.loads(line.removeprefix("ANSWERS ")) for line in lines]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_log_probabilities(name: str, tmp_path: Path) -> None:
    folder, asked = saved(name, tmp_path / "model"), prompts(*LENGTHS)
    expected = by_transformers(folder, asked)
    passes = by_vllm(folder, asked, times=2)
    assert len(passes) == 2
    for answers in passes:
        check(answers, expected)
    assert passes[1][3]["cached"] > 0


@pytest.mark.parametrize("name", ["llama: windows", "qwen3"])
def test_the_paged_kernel(name: str, tmp_path: Path) -> None:
    """Under Triton's interpreter, which conftest.py asks for."""
    folder, asked = saved(name, tmp_path / "model"), prompts(*LENGTHS)
    found = by_vllm(folder, asked, times=1, additional_config={"iha_paged_kernel": True})
    check(found[0], by_transformers(folder, asked))


def test_bfloat16(tmp_path: Path) -> None:
    """Tokens may differ where two are all but equal; the first log-probability is near."""
    folder, asked = saved("llama", tmp_path / "model"), prompts(*LENGTHS)
    (answers,) = by_vllm(folder, asked, times=1, dtype="bfloat16")
    for answer, (tokens, logprobs) in zip(answers, by_transformers(folder, asked), strict=True):
        for token, wanted, logprob, near in zip(
            answer["tokens"], tokens, answer["logprobs"], logprobs, strict=True
        ):
            if token != wanted:
                break
            assert abs(logprob - near) < 0.15


def test_a_prompt_of_32k_tokens_in_chunks(tmp_path: Path) -> None:
    """Window layers and a global one, read 2048 tokens at a time."""
    folder = saved("llama: windows", tmp_path / "model", max_position_embeddings=33000)
    asked = prompts(32_000)
    answers = by_vllm(
        folder,
        asked,
        times=1,
        max_model_len=32_768,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=512 << 20,
    )
    check(answers[0], by_transformers(folder, asked))


def check(answers: list[dict[str, Any]], expected: list[tuple[list[int], list[float]]]) -> None:
    for answer, (tokens, logprobs) in zip(answers, expected, strict=True):
        assert answer["tokens"] == tokens
        torch.testing.assert_close(
            torch.tensor(answer["logprobs"]), torch.tensor(logprobs), atol=3e-4, rtol=0
        )


def test_tensor_parallelism_is_refused_by_name() -> None:
    """Before anything is built; two processes of vLLM do not start on every CPU."""
    from iha.integrations.vllm.model import InterleavedHeadAttentionForCausalLM

    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=2))
    with pytest.raises(ValueError, match="tensor_parallel_size=1"):
        InterleavedHeadAttentionForCausalLM(vllm_config=config)
