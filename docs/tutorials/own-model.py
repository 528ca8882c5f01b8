# %% [markdown]
# # 2. IHA in a model of your own
#
# `import iha` needs PyTorch alone. This notebook shows the layer, the operator under it, and the
# three choices that you have: P, windows, and the backend.

# %%
import torch
from torch import nn

import iha

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The layer
#
# `iha.InterleavedHeadAttention` is a whole attention layer: projections, rotary positions, mixing,
# attention, output projection. It takes the place of the attention in a block.


# %%
class Block(nn.Module):
    def __init__(self, width, heads, **attention):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.attention = iha.InterleavedHeadAttention(width, heads, init="scratch", **attention)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x, cache=None):
        x = x + self.attention(self.norms[0](x), cache=cache)
        return x + self.mlp(self.norms[1](x))


class Decoder(nn.Module):
    def __init__(self, vocabulary=16, width=64, heads=4, layers=2, **attention):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, **attention) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids, caches=None):
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])
        return self.head(x)


model = Decoder(pseudo_heads=2)
print(model.blocks[0].attention.head_mixing)

# %% [markdown]
# ## Train it
#
# A toy task: the second half of a sequence repeats the first. The mixing tensors are a parameter
# group of their own, with a higher learning rate and without weight decay.


# %%
def batch(size, length=24):
    half = torch.randint(16, (size, length // 2))
    return torch.cat((half, half), dim=1)


optimizer = torch.optim.AdamW(
    iha.parameter_groups(model, lr=3e-3, mixing_lr=1e-2, weight_decay=0.1)
)
for step in range(201):
    ids = batch(32)
    logits = model(ids[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        repeated = (logits.argmax(-1) == ids[:, 1:])[:, 12:].float().mean()
        print(f"step {step}: loss {loss:.3f}, right in the second half {repeated:.2f}")

# %% [markdown]
# ## Decode with an ordinary cache
#
# The cache holds the base keys and values, as without IHA: nothing in it is P times larger. Token
# by token gives what the whole sequence gives.

# %%
ids = batch(1)
with torch.no_grad():
    caches = [iha.KeyValueCache() for _ in model.blocks]
    steps = [model(token, caches) for token in ids.split(1, dim=1)]
    print(f"difference {(torch.cat(steps, dim=1) - model(ids)).abs().max():.1e}")
print("keys of a layer:", tuple(caches[0].key.shape))

# %% [markdown]
# ## The operator
#
# Under the layer is one function. Its layout is that of `scaled_dot_product_attention`; the four
# mixing tensors come after query, key and value. `backend="reference"` is [the
# definition](../definition.md), written to be read, and every other backend is tested against it.

# %%
B, H, G, N, d, P = 1, 8, 2, 128, 32, 4
query = torch.randn(B, H, N, d)
key, value = torch.randn(2, B, G, N, d)
mixing = iha.HeadMixing(H, num_kv_heads=G, pseudo_heads=P, init="scratch")
tensors = (mixing.alpha_q, mixing.alpha_k, mixing.alpha_v, mixing.collapse)
with torch.no_grad():
    output = iha.interleaved_head_attention(query, key, value, *tensors)
    truth = iha.interleaved_head_attention(query, key, value, *tensors, backend="reference")
print(tuple(output.shape), f"difference {(output - truth).abs().max():.1e}")

# %% [markdown]
# ## Which backend runs, and why
#
# `backend="auto"` chooses. `iha.explain_backend` says what it would choose for a call, and why not
# the others.

# %%
print(iha.explain_backend(query, key, value, *tensors, window=16))

# %% [markdown]
# ## Choosing P
#
# A global layer costs P² times a plain layer's attention (Pq·P with `pseudo_queries=Pq`), and a
# head gets up to P² patterns. The paper's schedule keeps the price: four layers with a window of
# N/(2P²) tokens for one global layer.

# %%
LAYERS, LENGTH, HEADS, HEAD_DIM = 26, 8192, 20, 128  # the paper's 2.4B model
for P in (2, 4, 8, 20):
    schedule = iha.hybrid_schedule(LAYERS, LENGTH, P)
    ratio = schedule.flops(HEADS, HEAD_DIM) / schedule.plain_flops(HEADS, HEAD_DIM)
    print(
        f"P = {P}: window {schedule.window} tokens, {ratio:.2f} times the plain model's attention"
    )

# %% [markdown]
# A sensible first try is P = 2, or P = 4 with `pseudo_queries=1`, and then [measure](cost.ipynb).
# A window is an argument of the layer: `window=schedule.window`.
