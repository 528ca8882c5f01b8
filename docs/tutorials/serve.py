# %% [markdown]
# # 4. Serve it
#
# An IHA model keeps an ordinary key-value cache, so the engines that serve plain models serve it
# too. This notebook answers several requests together, by transformers' continuous batching, and
# shows the command for vLLM.

# %%
import time

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

import iha.hf  # registers IHA with transformers, and with its continuous batching
from iha_lab import models

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.manual_seed(0)
torch.set_num_threads(1)
model, tokenizer = models.load("smollm2")  # see the first notebook
iha.upcycle(model, pseudo_heads=2)
with torch.no_grad():  # as if it had been trained: no longer the plain model
    for parameter in iha.mixing_parameters(model):
        parameter += 0.01 * torch.randn_like(parameter)

# %% [markdown]
# ## One request
#
# `generate` takes every cache that transformers has.

# %%
PROMPTS = (
    "What is the capital of France?",
    "Name three colours.",
    "What is two plus three?",
    "Write one sentence about the sea.",
)
start = time.perf_counter()
alone = [models.complete(model, tokenizer, prompt, 16, chat=True) for prompt in PROMPTS]
print(f"one after the other: {time.perf_counter() - start:.1f} s")
for prompt, answer in zip(PROMPTS, alone, strict=True):
    print(f"{prompt} → {answer}")

# %% [markdown]
# ## Many requests
#
# `generate_batch` is continuous batching: requests of different lengths share each step, their
# keys and values lie in pages, and a request that ends makes room for the next. `transformers
# serve` uses the same.

# %%
ids = [models.encode(tokenizer, prompt)["input_ids"][0].tolist() for prompt in PROMPTS]
start = time.perf_counter()
results = model.generate_batch(
    ids,
    generation_config=GenerationConfig(
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ),
    continuous_batching_config=ContinuousBatchingConfig(
        num_blocks=64, page_size=32, max_batch_tokens=128
    ),
    progress_bar=False,
)
print(f"together: {time.perf_counter() - start:.1f} s")
together = [
    tokenizer.decode(result.generated_tokens, skip_special_tokens=True)
    for result in results.values()
]
print("the same answers:", together == alone)

# %% [markdown]
# ## What the cache holds
#
# The base keys and values of each token, as in the plain model: G key/value heads, and not P·G.

# %%
with torch.no_grad():
    cache = model(**models.encode(tokenizer, PROMPTS[0])).past_key_values
print("keys of a layer (batch, key/value heads, tokens, width):", tuple(cache.layers[0].keys.shape))

# %% [markdown]
# ## vLLM
#
# The library brings a plug-in. Save the model, install both, and start the server; nothing else is
# needed:
#
#     pip install "interleaved-head-attention[vllm]"
#     vllm serve my-iha-model
#
# Or from Python, `vllm.LLM("my-iha-model").generate(["…"])`. [Serving](../serving.md) says what is
# supported, and what is refused.
