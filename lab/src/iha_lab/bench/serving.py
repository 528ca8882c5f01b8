"""Serving with vLLM: throughput, time to first token, memory of a prompt, and the arithmetic.

    python -m iha_lab.bench.serving PLAIN IHA       # writes results/bench/serving.json
    python -m iha_lab.bench.serving TOKENS CHUNK    # prints the peak bytes of one prompt

PLAIN and IHA are folders of the same model before and after `upcycle`. Both are served at once by
two engines of one process and take turns, so that a noisy machine disturbs both alike. vLLM must be
installed; docs/serving.md is rendered from the file, with `iha_lab.report.readme`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import iha
from iha_lab.bench.measure import in_a_process, resident_peak, seconds
from iha_lab.files import write_text
from iha_lab.machine import machine

RESULT = Path(__file__).parents[4] / "results" / "bench" / "serving.json"
CPU = torch.device("cpu")
CONCURRENT, PROMPT, NEW, ROUNDS = (1, 8, 32), 64, 16, 3
CHUNKED = [(4096, 4096), (4096, 1024), (4096, 256)]
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_model_len": 512,
    "max_num_seqs": max(CONCURRENT),
    "kv_cache_memory_bytes": 1 << 30,
}


def sampling(new: int) -> Any:
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)


def engine(folder: str | Path, **options: Any) -> Any:
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    return LLM(str(folder), **OPTIONS | options)


def ask(llm: Any, requests: int, new: int, tokens: int = PROMPT) -> None:
    """Send random prompts at once and wait for all answers."""
    prompts = [[random.randint(3, 999) for _ in range(tokens)] for _ in range(requests)]
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = llm.generate(given, sampling(new), use_tqdm=False)
    if [len(answer.outputs[0].token_ids) for answer in found] != [new] * requests:
        raise RuntimeError("vLLM did not answer every request in full")


def raced(folders: dict[str, str]) -> list[dict[str, Any]]:
    """Time each number of requests, and one token alone, by turns; seconds of every round."""
    engines = {name: engine(folder) for name, folder in folders.items()}
    for llm in engines.values():
        ask(llm, 1, 2)
    rows: list[dict[str, Any]] = []
    for requests, new in ((1, 1), *((count, NEW) for count in CONCURRENT)):
        taken: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(ROUNDS):
            for name, llm in engines.items():
                taken[name].append(seconds(partial(ask, llm, requests, new), CPU))
        rows.append({"requests": requests, "new": new, "seconds": taken})
        print(rows[-1], flush=True)
    return rows


def prompt_peak(tokens: int, chunk: int) -> int:
    """Bytes at the peak of reading a prompt of `tokens` in chunks, over those before.

    SmolLM2-135M's shape with one layer and P = 4. The cache itself stands before.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
    shape: Any = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1}
    heads: Any = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=tokens + 8, **shape, **heads)
    with tempfile.TemporaryDirectory() as folder:
        iha.upcycle(LlamaForCausalLM(config), 4).save_pretrained(folder)
        llm = engine(
            folder,
            skip_tokenizer_init=True,
            max_model_len=tokens + 8,
            max_num_batched_tokens=chunk,
            max_num_seqs=1,
            kv_cache_memory_bytes=64 << 20,
        )
        ask(llm, 1, 1, tokens=64)
        return resident_peak(lambda: ask(llm, 1, 1, tokens=tokens))


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    if sys.argv[1].isdigit():
        print(prompt_peak(*map(int, sys.argv[1:])))
        return
    folders = {"plain": sys.argv[1], "iha": sys.argv[2]}
    rows = raced(folders)
    memory: list[dict[str, int]] = []
    for tokens, chunk in CHUNKED:
        peak = in_a_process("iha_lab.bench.serving", tokens, chunk)
        memory.append({"tokens": tokens, "chunk": chunk, "peak_mib": peak // 2**20})
        print(memory[-1], flush=True)
    config = AutoConfig.from_pretrained(folders["iha"])
    record = machine(CPU)
    record["versions"] |= {d.name: d.version for d in distributions() if "vllm" in d.name}
    record |= {
        "model": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "pseudo_heads": max(config.iha["pseudo_heads"].values()),
        "prompt": PROMPT,
        "rows": rows,
        "memory": memory,
    }
    write_text(RESULT, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
