"""A decoder of your own: train it on a toy task, then decode with an ordinary cache."""

import math

import torch
from torch import nn

import iha

VOCAB, WIDTH, HEADS, LENGTH = 16, 64, 4, 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.attention = iha.InterleavedHeadAttention(WIDTH, HEADS, pseudo_heads=2, init="scratch")
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))

    def forward(self, x: torch.Tensor, cache: iha.KeyValueCache | None = None) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x), cache=cache)
        return x + self.mlp(self.norms[1](x))


class Decoder(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(
        self, ids: torch.Tensor, caches: list[iha.KeyValueCache] | None = None
    ) -> torch.Tensor:
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])
        return self.head(x)


def batch(size: int) -> torch.Tensor:
    """Sequences that repeat their first half: the second half can be copied from it."""
    half = torch.randint(VOCAB, (size, LENGTH // 2))
    return torch.cat((half, half), dim=1)


torch.manual_seed(0)
model = Decoder()
best = math.log(VOCAB) * (LENGTH // 2 - 1) / (LENGTH - 1)
print(f"the first half cannot be foretold, so no loss is below {best:.2f}")
groups = iha.parameter_groups(model, lr=3e-3, mixing_lr=1e-2, weight_decay=0.1)
optimizer = torch.optim.AdamW(groups)
for step in range(201):
    ids = batch(32)
    logits = model(ids[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step}: loss {loss:.3f}")

with torch.no_grad():
    ids = batch(1)
    caches = [iha.KeyValueCache() for _ in model.blocks]
    steps = [model(token, caches) for token in ids.split(1, dim=1)]
    difference = (torch.cat(steps, dim=1) - model(ids)).abs().max()
print(f"token by token against all at once: {difference:.1e}")
print(f"a layer's cache: {tuple(caches[0].key.shape)}, as without IHA")
