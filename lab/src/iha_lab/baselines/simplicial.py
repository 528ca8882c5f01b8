"""2-simplicial attention."""

from __future__ import annotations

from typing import Literal

import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from iha.hf.attention_modules import AttentionLayer
from iha_lab.baselines.baseline import (
    Baseline,
    Inputs,
    biased,
    fresh,
    initializer,
    projection,
    refuse_a_cache,
    sizes,
    softmax,
)
from iha_lab.baselines.equipping import BaselineConfig

CHUNK = 2**24  # logits that exist at once


class SimplicialConfig(BaselineConfig):
    """2-simplicial attention, over pairs of keys (Roy et al., arXiv 2507.02754).

    `windows` are the paper's w1 and w2, in tokens; None: all pairs. `biases` adds the constants
    that its authors' kernels add to the second keys and values, and its equations do not.
    """

    kind: Literal["2-simplicial"] = "2-simplicial"
    windows: tuple[pydantic.PositiveInt, pydantic.PositiveInt] | None = None
    biases: bool = False

    @property
    def label(self) -> str:
        parts = ["2-simplicial"]
        parts += ["w{}x{}".format(*self.windows)] if self.windows else []
        parts += ["biases"] if self.biases else []
        return "-".join(parts)

    def build(self, layer: AttentionLayer) -> Simplicial:
        like = projection(layer, "key")
        return Simplicial(
            *sizes(layer),
            like.in_features,
            self.windows,
            self.biases,
            projection_bias=biased(like),
            std=initializer(layer),
        )


class Simplicial(Baseline):
    """Attention to pairs of tokens (Roy et al., arXiv 2507.02754, equations 5 to 7).

        A[h, n, s, r] = scale · Σ_l Q[h, n, l] K[g, s, l] K'[g, r, l]
        O[h, n] = Σ_{(s, r)} softmax_{(s, r)}(A[h, n, s, r]) · V[g, s] ⊙ V'[g, r],    g = g(h)

    over the pairs of which n sees both tokens, with `windows` = (w1, w2) those with n − s < w1 and
    n − r < w2 (|n − s|, |n − r| without causality). K' and V' are projections of what the model's
    key projection reads. They know no positions: the paper gives its form none, and says that it
    is not invariant to rotations; Q and K come rotated, as the model does.
    `biases` adds constants, 1/d to K' and 1 to V', as the kernels that its authors published do:
    then the layer is near attention to s alone while K' and V' are small.
    They start as the model's own projections do, with deviation `std`.

    Forward 6·H·d FLOPs a visible (n, s, r), the paper's count: two products and a sum, in the
    logits and in the values. Causal: N³/3 of them, or N·w1·w2; N³, or N·(2w1 − 1)·(2w2 − 1), else.
    Head by head and in blocks of queries, computed again in the backward pass; a block reads no
    more keys than its windows hold.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        in_features: int,
        windows: tuple[int, int] | None = None,
        biases: bool = False,
        projection_bias: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim)
        self.windows, self.biases = windows, biases
        self.key, self.value = (
            fresh(in_features, num_kv_heads * head_dim, projection_bias, std) for _ in range(2)
        )
        self._second: tuple[Tensor, Tensor] | None = None

    def attach(self, layer: AttentionLayer) -> None:
        projection(layer, "key").register_forward_hook(self._project)

    def _project(self, module: object, args: tuple[Tensor, ...], out: object) -> None:
        self._second = self.second(args[0])

    def second(
        self, states: Float[Tensor, "B S E"]
    ) -> tuple[Float[Tensor, "B G S d"], Float[Tensor, "B G S d"]]:
        """Project to K' and V', constants included."""
        key, value = (
            linear(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.key, self.value)
        )
        return (key + 1 / self.head_dim, value + 1) if self.biases else (key, value)

    def forward(self, inputs: Inputs) -> Float[Tensor, "B H N d"]:
        second, self._second = self._second, None
        refuse_a_cache(inputs, "2-simplicial attention", "its second keys and values")
        assert second is not None  # the layer projects before it attends
        return self.attend(inputs, *second)

    def attend(
        self,
        inputs: Inputs,
        second_key: Float[Tensor, "B G N d"],
        second_value: Float[Tensor, "B G N d"],
    ) -> Float[Tensor, "B H N d"]:
        """Attend to pairs of tokens, with these second keys and values."""
        query, key, value, causal = inputs.query, inputs.key, inputs.value, inputs.causal
        B, H, N, _ = query.shape
        w1, w2 = (min(window, N) for window in self.windows or (N, N))
        reach = [w if causal else 2 * w - 1 for w in (w1, w2)]
        block = max(1, CHUNK // (B * min(N, reach[0]) * min(N, reach[1])))
        if self.windows is not None:
            # More queries than the shorter window would be mostly masked out.
            block = min(block, w1, w2)
        visible = inputs.mask().expand(B, H, N, N)
        heads: list[Tensor] = []
        for h in range(H):
            g = h // (H // key.shape[1])
            blocks: list[Tensor] = []
            for start in range(0, N, block):
                stop = min(start + block, N)
                rows = slice(start, stop)
                end1, end2 = (stop, stop) if causal else (min(N, stop + w - 1) for w in (w1, w2))
                s, r = slice(max(0, start - w1 + 1), end1), slice(max(0, start - w2 + 1), end2)
                arguments = (
                    inputs.scale * query[:, h, rows],
                    key[:, g, s],
                    value[:, g, s],
                    second_key[:, g, r],
                    second_value[:, g, r],
                    visible[:, h, rows, s] & _near(rows, s, w1, query.device),
                    visible[:, h, rows, r] & _near(rows, r, w2, query.device),
                )
                # Kept, the pairs of all blocks would be what autograd holds.
                out = checkpoint(_block, *arguments, use_reentrant=False)
                assert isinstance(out, Tensor)
                blocks.append(out)
            heads.append(torch.cat(blocks, 1))
        return torch.stack(heads, 1)

    def flops(self, seq_len: int, causal: bool) -> int:
        N = seq_len
        triples = N**3 // 3 if causal else N**3
        if self.windows is not None:
            reach = (w if causal else 2 * w - 1 for w in self.windows)
            first, second = (min(N, r) for r in reach)
            triples = min(triples, N * first * second)
        return 6 * self.num_heads * self.head_dim * triples


def _near(rows: slice, keys: slice, window: int, device: torch.device) -> Bool[Tensor, "T S"]:
    n = torch.arange(rows.start, rows.stop, device=device)[:, None]
    s = torch.arange(keys.start, keys.stop, device=device)
    return (n - s).abs() < window


def _block(
    query: Float[Tensor, "B T d"],
    key: Float[Tensor, "B S d"],
    value: Float[Tensor, "B S d"],
    second_key: Float[Tensor, "B R d"],
    second_value: Float[Tensor, "B R d"],
    first_visible: Bool[Tensor, "B T S"],
    second_visible: Bool[Tensor, "B T R"],
) -> Float[Tensor, "B T d"]:
    B, T, _ = query.shape
    # A query times a second key is one more query; products with all keys are then one matmul.
    both = (query[:, :, None] * second_key[:, None]).flatten(1, 2)
    logits = (both @ key.mT).view(B, T, -1)
    visible = (second_visible[..., None] & first_visible[:, :, None]).flatten(2)
    weights = softmax(logits, visible).view(B, -1, key.shape[1])
    attended = (weights @ value).view(B, T, -1, value.shape[-1])
    return (attended * second_value[:, None]).sum(2)
