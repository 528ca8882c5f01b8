"""Generate greedily with vLLM, in a process of its own: JSON from stdin, answers to stdout."""

import json
import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process starts in half the time

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    llm = LLM(request["folder"], **request["options"])
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    sampling = SamplingParams(
        temperature=0, max_tokens=request["new"], logprobs=1, detokenize=False, ignore_eos=True
    )
    for _ in range(request["times"]):
        answers = []
        for found in llm.generate(prompts, sampling, use_tqdm=False):
            output = found.outputs[0]
            logprobs = [
                row[token].logprob
                for row, token in zip(output.logprobs, output.token_ids, strict=True)
            ]
            answers.append(
                {
                    "tokens": list(output.token_ids),
                    "logprobs": logprobs,
                    "cached": found.num_cached_tokens or 0,
                }
            )
        print("ANSWERS", json.dumps(answers), flush=True)
