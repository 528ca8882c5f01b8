"""Peak memory of reading a prompt at once and in chunks.

    python -m iha_lab.bench.prefill                 # writes results/bench/prefill.json
    python -m iha_lab.bench.prefill TOKENS CHUNK    # prints bytes for one of its rows; 0: at once

SmolLM2-135M's shape with one layer and P = 4, and a batch of two of which one is padded, as
`iha eval` has it; each measurement in a process of its own, beyond what the model takes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import iha
from iha_lab.bench.measure import in_a_process, resident_peak
from iha_lab.files import write_text
from iha_lab.machine import machine

RESULT = Path(__file__).parents[4] / "results" / "bench" / "prefill.json"
CASES = [(2048, 0), (2048, 1024), (2048, 256), (4096, 0), (4096, 1024), (4096, 256)]
CASES += [(8192, 256), (16384, 256)]


def measured(tokens: int, chunk: int) -> int:
    """Measure bytes at the peak of `generate`, beyond those before it."""
    shape: Any = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1}
    heads: Any = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=49152, max_position_embeddings=tokens + 8, **shape, **heads)
    model = iha.upcycle(LlamaForCausalLM(config).eval(), 4)
    model.generation_config.prefill_chunk_size = chunk or None
    prompts = torch.randint(3, 40_000, (2, tokens))
    mask = torch.ones_like(prompts)
    mask[1, :37] = 0
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    return resident_peak(lambda: model.generate(prompts, attention_mask=mask, **options))


def main() -> None:
    if sys.argv[1:]:
        print(measured(*map(int, sys.argv[1:])))
        return
    rows: list[dict[str, int]] = []
    for tokens, chunk in CASES:
        peak = in_a_process("iha_lab.bench.prefill", tokens, chunk)
        rows.append({"tokens": tokens, "chunk": chunk, "peak_mib": peak // 2**20})
        print(rows[-1], flush=True)
    record = {**machine(torch.device("cpu")), "rows": rows}
    write_text(RESULT, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
