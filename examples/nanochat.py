"""The edit that gives IHA to a model of nanochat's layout, which calls FlashAttention itself.

The lines of the edit end in `# IHA`. The rest is a small GPT laid out as nanochat's: tokens before
heads, rotation by -θ, QK norm after it, windows as FlashAttention has them, its own cache that is
allocated once, initialisation after `to_empty`, Muon for the matrices.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

import iha


@dataclasses.dataclass
class Config:
    vocab_size: int = 32
    sequence_len: int = 64
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 2
    n_embd: int = 64
    window_pattern: str = "SSSL"
    pseudo_heads: int = 2  # IHA
    init: str = "upcycle"  # IHA: exactly the plain model; "scratch" for heads mixed from the start


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]
) -> Tensor:
    """FlashAttention's contract on any device: the last query is level with the last key."""
    assert causal
    ahead = torch.arange(k.size(1)) - torch.arange(k.size(1) - q.size(1), k.size(1))[:, None]
    visible = ahead <= 0
    if window_size[0] >= 0:
        visible &= ahead >= -window_size[0]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = functional.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)
    return y.transpose(1, 2)


class KVCache:
    def __init__(self, batch_size: int, length: int, config: Config) -> None:
        width = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, length, config.n_kv_head, width)
        self.k, self.v, self.pos = torch.zeros(shape), torch.zeros(shape), 0

    def insert(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.pos + k.size(1)
        self.k[layer, :, self.pos : end], self.v[layer, :, self.pos : end] = k, v
        return self.k[layer, :, :end], self.v[layer, :, :end]


def norm(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.size(-1),))


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=3)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), 3)  # by -θ


class CausalSelfAttention(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.n_embd // config.n_head
        kv_dim = config.n_kv_head * self.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        sizes = {"num_kv_heads": config.n_kv_head, "pseudo_heads": config.pseudo_heads}  # IHA
        self.mixing = iha.HeadMixing(config.n_head, init=config.init, **sizes)  # IHA

    def forward(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        window_size: tuple[int, int],
        kv_cache: KVCache | None,
    ) -> Tensor:
        q, k, v = (c(x).unflatten(2, (-1, self.head_dim)) for c in (self.c_q, self.c_k, self.c_v))
        q, k = (1.2 * norm(apply_rotary_emb(t, *cos_sin)) for t in (q, k))
        window = iha.window_from_flash(window_size)  # IHA
        if kv_cache is None:
            q, k, v = self.mixing.expand(q, k, v, layout="bshd")  # IHA
            window_size = self.mixing.flash_window(window)  # IHA
            y = flash_attn_func(q, k, v, causal=True, window_size=window_size)
            y = self.mixing.reduce(y)  # IHA
        else:
            k, v = kv_cache.insert(self.layer, k, v)
            y = self.mixing(q, k, v, window=window, layout="bshd")  # IHA
        return self.c_proj(y.flatten(2))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, *context: object) -> Tensor:
        x = x + self.attn(norm(x), *context)
        return x + self.c_proj(functional.relu(self.c_fc(norm(x))).square())


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        last, pattern = config.n_layer - 1, config.window_pattern
        short = [pattern[i % len(pattern)] == "S" and i < last for i in range(config.n_layer)]
        self.window_sizes = [(config.sequence_len // 4, 0) if s else (-1, 0) for s in short]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Everything, since the model was built on the meta device."""
        bound = 3**0.5 * self.config.n_embd**-0.5
        for name, parameter in self.named_parameters():
            nn.init.uniform_(parameter, -bound, bound)
            if name.endswith("c_proj.weight"):
                parameter.zero_()
        for block in self.h:
            block.attn.mixing.reset_parameters()  # IHA

    def setup_optimizers(self) -> list[torch.optim.Optimizer]:
        mixing = iha.mixing_parameters(self)  # IHA
        kept = {id(p) for p in mixing}  # IHA
        matrices = [p for p in self.h.parameters() if id(p) not in kept]  # IHA: these go to Muon
        groups = [
            {"params": [self.wte.weight, self.lm_head.weight], "lr": 3e-3, "weight_decay": 0.01},
            {"params": mixing, "lr": 3e-3, "weight_decay": 0.0},  # IHA
        ]
        adamw, muon = torch.optim.AdamW(groups), torch.optim.Muon(matrices, lr=0.02)
        iha.check_optimizers(self, adamw, muon)  # IHA
        return [adamw, muon]

    def forward(self, ids: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        first = 0 if kv_cache is None else kv_cache.pos
        n = torch.arange(first, first + ids.size(1))
        frequencies = iha.inverse_frequencies(self.config.n_embd // self.config.n_head)
        cos_sin = tuple(t[:, None] for t in iha.rotary_tables(n, frequencies))
        x = norm(self.wte(ids))
        for block, window_size in zip(self.h, self.window_sizes, strict=True):
            x = block(x, cos_sin, window_size, kv_cache)
        if kv_cache is not None:
            kv_cache.pos += ids.size(1)
        return self.lm_head(norm(x))


def build(config: Config) -> GPT:
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu").init_weights()
    return model


def train(model: GPT, steps: int) -> list[float]:
    """Sequences that repeat their first half: the second half can be copied from it."""
    optimizers, losses = model.setup_optimizers(), []
    for _ in range(steps):
        half = torch.randint(model.config.vocab_size, (16, 12))
        ids = torch.cat((half, half), dim=1)
        loss = functional.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def decode(model: GPT, ids: Tensor, prefill: int) -> Tensor:
    """Logits of `ids`, the first `prefill` at once and the others token by token."""
    cache = KVCache(*ids.shape, model.config)
    pieces = [ids[:, :prefill], *ids[:, prefill:].split(1, dim=1)]
    with torch.no_grad():
        return torch.cat([model(piece, cache) for piece in pieces], dim=1)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = build(Config(init="scratch"))
    losses = train(model, 150)
    print(f"loss {losses[0]:.2f}, after {len(losses)} steps {losses[-1]:.2f}")
    ids = torch.randint(model.config.vocab_size, (2, 40))
    with torch.no_grad():
        difference = (decode(model, ids, prefill=7) - model(ids)).abs().max()
    print(f"decoding with its own cache against the full pass: {difference:.1e}")
