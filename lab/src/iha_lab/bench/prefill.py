"""Peak memory of reading a prompt at once and in chunks, into results/bench/prefill.json.

SmolLM2-135M's shape with one layer and P = 4, and a batch of two of which one is padded, as
`iha eval` has it; each measurement in a process of its own, beyond what the model takes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from iha_lab.files import write_text
from iha_lab.machine import machine

RESULT = Path(__file__).parents[4] / "results" / "bench" / "prefill.json"
CASES = [(2048, None), (2048, 1024), (2048, 256), (4096, None), (4096, 1024), (4096, 256)]
CASES += [(8192, 256), (16384, 256)]


def measure(tokens: int, chunk: int | None) -> int:
    """MiB at the peak of `generate`, beyond those before it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import iha

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=49152, max_position_embeddings=tokens + 8, **shape, **heads)
    model = iha.upcycle(LlamaForCausalLM(config).eval(), 4)
    model.generation_config.prefill_chunk_size = chunk
    prompts = torch.randint(3, 40_000, (2, tokens))
    mask = torch.ones_like(prompts)
    mask[1, :37] = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.generate(prompts, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def main() -> None:
    if sys.argv[1:]:
        tokens, chunk = (int(argument) for argument in sys.argv[1:])
        print(measure(tokens, chunk or None))
        return
    rows: list[dict[str, int | None]] = []
    for tokens, chunk in CASES:
        command = [sys.executable, __file__, str(tokens), str(chunk or 0)]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append({"tokens": tokens, "chunk": chunk, "peak_mib": int(found.split()[-1])})
        print(rows[-1], flush=True)
    record = {**machine(torch.device("cpu")), "rows": rows}
    write_text(RESULT, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
