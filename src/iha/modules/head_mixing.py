"""The four small tensors of a layer, and the ways to start them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from iha.call import Layout
from iha.checks import (
    check_choice,
    check_factory,
    check_flag,
    check_heads,
    checked_call,
    checked_noise,
    checked_size,
    checked_window,
)
from iha.mixing import collapse_tokens, interleaved_inputs
from iha.operator import interleaved_head_attention
from iha.rotary import Phase, RotaryConvention

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float

    from iha.call import Call

Init = Literal["upcycle", "scratch", "identity"]
WIDE, HALF = (torch.float64, torch.float32), (torch.bfloat16, torch.float16)


class HeadMixing(nn.Module):
    r"""The mixing tensors of one Interleaved Head Attention layer.

    Shapes, with H query heads, G key/value heads and P pseudo-heads:
    `alpha_q` (H, H, P), `alpha_k` and `alpha_v` (G, G, P), `collapse` (H, H, P), or (H, P) with
    `per_head_collapse`. Column α[:, h, p] says how pseudo-head p of head h is put together from all
    heads; R[h', h, p] how much of it goes into output head h'. With `pseudo_queries` = Pq < P,
    `alpha_q` and `collapse` have Pq columns: the last Pq of P pseudo-queries, at Pq/P of the price.

    They are float32 unless `dtype` says otherwise, and stay so where a model is cast to bfloat16 or
    float16 (`.to`, `.half`): next to 1, bfloat16 has steps of 0.008, which no usual learning rate
    takes, so such tensors would not train. Each call casts them to the dtype of its query.

    `init` names the start: "upcycle" for pretrained base weights, "scratch" for random ones.

    - `"upcycle"`: computes exactly what plain attention computes on the same query, key and value,
      with or without causality and windows (RoPE mode `token`). α^K are equal replicas, so P equal
      keys share a softmax weight equally; α^V = 1 + ε with Σ_q ε = 0, which cancels in the output
      and keeps the pseudo-heads from receiving equal gradients; the last pseudo-query is the base
      query and the only one that R selects, since under flat causality only it sees all replicas
      of its own token. `value_noise` is the standard deviation of ε before its mean is taken out,
      `query_noise` that of the free pseudo-queries around the identity.
    - `"scratch"`: for training from random weights; the paper gives no recipe. Every α is
      (1[m = h] + ξ/√heads)/√2 with ξ ~ N(0, 1): half of a pseudo-head's variance is its own head,
      half comes from all heads, so heads can specialise, pseudo-heads differ from the first step
      and the variance of queries, keys and values is that of the base. R is the same, over P: an
      average, so the output's RMS is about 0.7, 0.6, 0.5 of plain attention's for P = 2, 4, 8.
    - `"identity"`: every pseudo-head is its base head, R their mean. Equal to plain attention
      without causality, or with token causality; *not* under flat causality with P > 1.

    Raises TypeError or ValueError, with the argument's name: a size that is no integer or below 1,
    a G that does not divide H, an unknown `init`, a noise that is negative or beyond 10⁴.

    >>> HeadMixing(8, num_kv_heads=2, pseudo_heads=4, init="upcycle").extra_repr()
    "num_heads=8, num_kv_heads=2, pseudo_heads=4, init='upcycle', parameters=544"
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        pseudo_heads: int = 2,
        pseudo_queries: int | None = None,
        init: Init,
        per_head_collapse: bool = False,
        value_noise: float = 0.1,
        query_noise: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        H = checked_size("num_heads", num_heads)
        G = H if num_kv_heads is None else checked_size("num_kv_heads", num_kv_heads)
        P = Pq = checked_size("pseudo_heads", pseudo_heads)
        if pseudo_queries is not None:
            Pq = checked_size("pseudo_queries", pseudo_queries, at_most=P)
        if H % G:
            raise ValueError(f"num_kv_heads must divide num_heads, got {G} and {H}.")
        check_choice("init", init, get_args(Init))
        check_flag("per_head_collapse", per_head_collapse)
        check_factory(device, dtype)
        self.num_heads, self.num_kv_heads = H, G
        self.pseudo_heads, self.pseudo_queries = P, Pq
        self.init, self.per_head_collapse = init, per_head_collapse
        self.value_noise = checked_noise("value_noise", value_noise)
        self.query_noise = checked_noise("query_noise", query_noise)

        dtype = torch.float32 if dtype is None else dtype

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.alpha_q = empty(H, H, Pq)
        self.alpha_k = empty(G, G, P)
        self.alpha_v = empty(G, G, P)
        self.collapse = empty(H, Pq) if per_head_collapse else empty(H, H, Pq)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again, as `init` says.

        Parameters that are sharded (FSDP2 fills a model that was built on the meta device so) get
        their parts of what the first rank draws.
        """
        for parameter, start in zip(self.parameters(), self._start(), strict=True):
            mesh: Any = getattr(parameter, "device_mesh", None)
            if mesh is not None:
                from torch.distributed.tensor import distribute_tensor

                start = distribute_tensor(start, mesh, parameter.placements)  # type: ignore[attr-defined]
            parameter.copy_(start)

    def _start(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Whole tensors to start from, in the order of the parameters."""
        alphas = tuple(map(_replicas, (self.alpha_q, self.alpha_k, self.alpha_v)))
        alpha_q, alpha_k, alpha_v = alphas
        if self.init == "upcycle":
            free = alpha_q[:, :, :-1]
            free += self.query_noise * torch.randn_like(free)
            epsilon = self.value_noise * torch.randn_like(alpha_v)
            alpha_v += epsilon - epsilon.mean(-1, keepdim=True)
            collapse = torch.zeros_like(alpha_q)
            collapse[:, :, -1] = torch.eye(self.num_heads, device=collapse.device)
        elif self.init == "scratch":
            for alpha in alphas:
                alpha += torch.randn_like(alpha) / math.sqrt(alpha.shape[0])
                alpha /= math.sqrt(2)
            collapse = _replicas(alpha_q)
            collapse += torch.randn_like(collapse) / math.sqrt(self.num_heads)
            collapse /= math.sqrt(2) * self.pseudo_queries
        else:
            collapse = _replicas(alpha_q) / self.pseudo_queries
        if self.per_head_collapse:
            collapse = collapse.diagonal().T
        return alpha_q, alpha_k, alpha_v, collapse

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeadMixing:
        """What `.to` and its like end in: a wide tensor is moved, and never made a narrow one."""

        def wide(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            if tensor.dtype in WIDE and found.dtype in HALF:
                return tensor.to(found.device, torch.float32)
            return found

        return super()._apply(wide, recurse)  # pyright: ignore[reportPrivateUsage]

    def forward(
        self,
        query: Float[Tensor, "B H N d"],
        key: Float[Tensor, "B G S d"],
        value: Float[Tensor, "B G S d"],
        *,
        record: Callable[[Call], object] | None = None,
        **arguments: Any,
    ) -> Float[Tensor, "B H N d"]:
        """`interleaved_head_attention` with these tensors; keyword arguments are passed on.

        `record` is given the checked call, from which `iha.AttentionPattern` shows the weights.
        """
        mixing = (self.alpha_q, self.alpha_k, self.alpha_v, self.collapse)
        if record is not None:
            call = {name: value for name, value in arguments.items() if name != "backend"}
            record(checked_call(query, key, value, *mixing, **call))
        return interleaved_head_attention(query, key, value, *mixing, **arguments)

    def expand(
        self,
        query: Float[Tensor, "B N H d"],
        key: Float[Tensor, "B S G d"],
        value: Float[Tensor, "B S G d"],
        *,
        phase: Phase | None = None,
        rotary: RotaryConvention = "half",
        layout: Layout = "bshd",
    ) -> tuple[Float[Tensor, "B NPq H d"], Float[Tensor, "B SP G d"], Float[Tensor, "B SP G d"]]:
        """Virtual tokens for an attention call of your own, whose output `reduce` takes.

            q, k, v = mixing.expand(q, k, v)
            y = flash_attn_func(q, k, v, causal=True, window_size=mixing.flash_window(W))
            y = mixing.reduce(y)

        is `mixing(q, k, v, window=W, layout="bshd")`, flat causality, where the last query is level
        with the last key. Contiguous, and not copied after the mixing. `layout` is of input and
        output. Raises ValueError for Pq < P with several query tokens: no causal sequence.
        """
        mixing = (self.alpha_q, self.alpha_k, self.alpha_v, self.collapse)
        tensors = (query, key, value, *mixing)
        call = checked_call(*tensors, causal=None, phase=phase, rotary=rotary, layout=layout)
        N, Pq, P = call.query.shape[2], self.pseudo_queries, self.pseudo_heads
        if Pq < P and N > 1:
            raise ValueError(
                f"pseudo_queries = {Pq} of pseudo_heads = {P} are no causal sequence of virtual"
                f" tokens for more than one query token, got {N}; call the module itself."
            )
        query, key, value = interleaved_inputs(call)
        if layout == "bshd":
            query, key, value = (virtual.transpose(1, 2) for virtual in (query, key, value))
        return query, key, value

    def reduce(
        self, output: Float[Tensor, "B NPq H d"], *, layout: Layout = "bshd"
    ) -> Float[Tensor, "B N H d"]:
        """The output heads R of what attention gave for the virtual tokens of `expand`."""
        check_choice("layout", layout, get_args(Layout))
        check_heads("output", output, layout)
        virtual = output if layout == "bshd" else output.transpose(1, 2)
        if virtual.shape[2] != self.num_heads or virtual.shape[1] % self.pseudo_queries:
            raise ValueError(
                f"output must have {self.num_heads} heads and a multiple of {self.pseudo_queries}"
                f" virtual tokens in layout={layout!r}, got shape {tuple(output.shape)}."
            )
        heads = collapse_tokens(virtual.unflatten(1, (-1, self.pseudo_queries)), self.collapse)
        return heads.transpose(1, 2) if layout == "bshd" else heads

    def flash_window(self, window: int | None) -> tuple[int, int]:
        """`window_size` of FlashAttention for virtual tokens: (W·P - 1, 0), or (-1, 0) for None."""
        window = checked_window(window)
        return (-1, 0) if window is None else (window * self.pseudo_heads - 1, 0)

    def parameter_count(self) -> int:
        """H²·Pq + 2G²·P + H²·Pq, or H·Pq as the last term with a per-head collapse."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def drop_unread_(self) -> int:
        """Remove the first pseudo-queries that R does not read, in place; return how many stay.

        A pseudo-query p with R[h', h, p] = 0 for all heads adds nothing to the output. As long as
        the first ones are such, they can go: the function stays the same, at Pq/P of the price.
        """
        read = (self.collapse != 0).flatten(0, -2).any(0).nonzero()
        first = int(read[0]) if len(read) else self.pseudo_queries - 1
        for name in ("alpha_q", "collapse"):
            tensor = getattr(self, name)
            setattr(self, name, nn.Parameter(tensor[..., first:].clone(), tensor.requires_grad))
        self.pseudo_queries -= first
        return self.pseudo_queries

    @torch.no_grad()
    def fold_(
        self, q_proj: nn.Linear, k_proj: nn.Linear, v_proj: nn.Linear, o_proj: nn.Linear
    ) -> None:
        """Multiply the mixing into the projections, in place, and become the identity (P = 1 only).

        With one pseudo-head the mixing is linear before and after the attention, so
        W_Q[h] ← Σ_m α^Q[m,h] W_Q[m], the same for keys and values and their biases, and
        W_O[:, h] ← Σ_h' R[h',h] W_O[:, h']. Plain multi-head attention is left, at no extra cost.
        Exact where nothing but a rotation stands between projection and attention (no QK-norm).

        Raises ValueError for P > 1, where the mixing sits inside one softmax over P² pairs a token
        pair and cannot be folded, or for projections whose sizes do not fit the heads.
        """
        if self.pseudo_heads > 1:
            raise ValueError(
                f"fold_ needs pseudo_heads = 1, got {self.pseudo_heads}: with more than one, the"
                " mixing acts inside the softmax and no projection weights can express it."
            )
        # Every size is checked before the first weight is touched.
        linears = {"q_proj": q_proj, "k_proj": k_proj, "v_proj": v_proj, "o_proj": o_proj}
        for name, linear in linears.items():
            size = linear.in_features if linear is o_proj else linear.out_features
            heads = self.num_kv_heads if name in ("k_proj", "v_proj") else self.num_heads
            if size % heads:
                raise ValueError(
                    f"{name} has {size} features, which {heads} heads do not divide; give fold_"
                    " the projections of the layer that these tensors mix."
                )
        projections = ((q_proj, self.alpha_q), (k_proj, self.alpha_k), (v_proj, self.alpha_v))
        for projection, alpha in projections:
            for tensor in projection.parameters():
                heads = tensor.unflatten(0, (alpha.shape[0], -1))
                mixed = torch.einsum("m...,mh->h...", heads, alpha[..., 0].to(tensor.dtype))
                tensor.copy_(mixed.flatten(0, 1))
        collapse = self.collapse[..., 0].diag() if self.per_head_collapse else self.collapse[..., 0]
        weight = o_proj.weight.unflatten(1, (self.num_heads, -1))
        mixed = torch.einsum("eod,oh->ehd", weight, collapse.to(weight.dtype))
        o_proj.weight.copy_(mixed.flatten(1))
        self.init = "identity"
        self.reset_parameters()

    def extra_repr(self) -> str:
        P, Pq = self.pseudo_heads, self.pseudo_queries
        queries = f" pseudo_queries={Pq}," if Pq < P else ""
        collapse = ", per_head_collapse=True" if self.per_head_collapse else ""
        sizes = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, pseudo_heads={P},"
        start = f" init={self.init!r}{collapse}, parameters={self.parameter_count()}"
        return sizes + queries + start


def _replicas(alpha: Float[Tensor, "H H P"]) -> Float[Tensor, "H H P"]:
    """1[m = h] for every p."""
    eye = torch.eye(alpha.shape[0], device=alpha.device, dtype=alpha.dtype)
    return eye[:, :, None].repeat(1, 1, alpha.shape[2])
