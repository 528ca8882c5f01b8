# %% [markdown]
# # 5. What it costs: predict and measure
#
# IHA with P pseudo-heads turns N tokens into N·P virtual ones, so a global layer has P² times the
# attention scores. This notebook predicts the price of a layer and then measures it, on this
# machine. On another machine the numbers differ: run it there. About a minute.

# %%
import statistics
import time

import matplotlib.pyplot as plt
import torch

import iha

torch.manual_seed(0)
torch.set_num_threads(1)
H, G, N, d = 8, 4, 1024, 64

# %% [markdown]
# ## Predict
#
# `iha.attention_flops` counts what a layer's attention does, forward, mixing included. Projections
# and the MLP, which IHA does not change, are not in it. In a whole model they are often the larger
# part: the price of the model rises much less than that of its attention.

# %%
CASES = {
    "plain": {},
    "P = 2, Pq = 1": {"pseudo_heads": 2, "pseudo_queries": 1},
    "P = 2": {"pseudo_heads": 2},
    "P = 4, Pq = 1": {"pseudo_heads": 4, "pseudo_queries": 1},
    "P = 4": {"pseudo_heads": 4},
    "P = 4, window 64": {"pseudo_heads": 4, "window": 64},
}


plain = iha.attention_flops(N, H, d)
predicted = {
    name: iha.attention_flops(N, H, d, num_kv_heads=G, **case) / plain
    for name, case in CASES.items()
}
for name, ratio in predicted.items():
    print(f"{name:<18} {ratio:5.2f} times plain attention")

# %% [markdown]
# ## Measure
#
# One layer's attention, forward, with the backend that `auto` chooses. Each case is timed several
# times in turn, so that a busy moment hits all of them; the median counts.


# %%
def call_of(pseudo_heads=1, pseudo_queries=None, window=None):
    query = torch.randn(1, H, N, d)
    key, value = torch.randn(2, 1, G, N, d)
    if pseudo_heads == 1:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True)
    mixing = iha.HeadMixing(
        H, num_kv_heads=G, pseudo_heads=pseudo_heads, pseudo_queries=pseudo_queries, init="upcycle"
    )
    return lambda: mixing(query, key, value, window=window)


calls = {name: call_of(**case) for name, case in CASES.items()}
seconds = {name: [] for name in CASES}
with torch.no_grad():
    for turn in range(9):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
measured = {name: statistics.median(times) for name, times in seconds.items()}
for name, found in measured.items():
    ratio, expected = found / measured["plain"], predicted[name]
    print(f"{name:<18} {1000 * found:6.1f} ms  {ratio:5.2f} times plain, predicted {expected:.2f}")

# %%
figure, axis = plt.subplots(figsize=(6.5, 3), layout="constrained")
rows = list(CASES)[::-1]
ratios = {name: found / measured["plain"] for name, found in measured.items()}
look = {"predicted": (predicted, "o", "#0072b2"), "measured": (ratios, "D", "#d55e00")}
for label, (values, marker, colour) in look.items():
    axis.plot([values[name] for name in rows], rows, marker, color=colour, mfc="none", label=label)
axis.set_xlabel("times plain attention")
axis.grid(axis="x", alpha=0.3)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## A whole model
#
# Attention is a part of a model's work, and the part grows with N. For the paper's 2.4B model,
# with its schedule of windows, at N = 8192:

# %%
LAYERS, LENGTH, WIDTH, HEADS, HEAD_DIM, P = 26, 8192, 2560, 20, 128, 20
schedule = iha.hybrid_schedule(LAYERS, LENGTH, P)
everything_else = 2 * 2.4e9 * LENGTH  # two FLOPs a parameter and token
plain = everything_else + schedule.plain_flops(HEADS, HEAD_DIM)
interleaved = everything_else + schedule.flops(HEADS, HEAD_DIM)
print(
    f"attention is {schedule.plain_flops(HEADS, HEAD_DIM) / plain:.0%} of the plain model's FLOPs"
)
print(f"with IHA the model takes {interleaved / plain:.2f} times as many")

# %% [markdown]
# FLOPs are not seconds: kernels reach different shares of what a machine can do, and a short
# window leaves little to do per call. [Benchmarks](../benchmarks.md) has whole training steps and
# decoding, and `iha bench` measures all backends on your device.
