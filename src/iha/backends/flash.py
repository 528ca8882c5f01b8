"""The N·P virtual tokens through FlashAttention 4, 3 or 2, whichever is installed and able.

Under flat causality interleaved tokens are an ordinary causal sequence, and a window of W tokens is
its sliding window of W·P. Fewer pseudo-queries are several such bands (`merged`), which PyTorch's
own FlashAttention runs. What no band over the virtual tokens can say is refused.

FlashAttention counts positions from the end: its last query is level with its last key. So keys
behind the last query are left out first, and a query always sees itself, never nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iha.backends import alternatives, flex, merged
from iha.call import Call, Refusal
from iha.mixing import interleaved_inputs, interleaved_output

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

NAME = "flash"


@dataclasses.dataclass(frozen=True)
class Package:
    """A generation of FlashAttention, and how it differs from the others."""

    name: str
    majors: tuple[int, ...]  # the compute capabilities it has kernels for
    widest: int  # head dimension
    unlimited: int | None = -1  # "no limit" in its `window_size`
    dropout: bool = False


PACKAGES = (
    Package("flash_attn.cute", (9, 10, 11), 128, unlimited=None),
    Package("flash_attn_interface", (9,), 256),
    Package("flash_attn", (8, 9, 10, 11, 12), 256, dropout=True),
)


def refusal(call: Call) -> Refusal | None:
    # What has to read from the GPU comes last.
    why = unfit_tensors(call) or _inexpressible(call) or _no_package(call) or _scattered(call)
    if why is None:
        return None

    def sentence() -> str:
        able = "'flex'" if flex.refusal(call) is None else alternatives.instead(call)
        return f"{why()}; {able} can do it"

    return sentence


def unfit_tensors(call: Call) -> Refusal | None:
    """Why no FlashAttention takes such tensors."""
    query = call.query
    if not query.is_cuda:
        return lambda: f"FlashAttention needs a CUDA device, not {query.device.type}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return lambda: f"FlashAttention computes in float16 or bfloat16, not {query.dtype}"
    return None


def _inexpressible(call: Call) -> Refusal | None:
    """Why no FlashAttention can be told this call."""
    band = call.causal == "flat" or call.pseudo_heads == 1
    if torch.compiler.is_compiling():
        return lambda: "FlashAttention would break the graph of torch.compile"
    if call.query.shape[3] % 8:
        return lambda: f"the head dimension must be a multiple of 8, not {call.query.shape[3]}"
    if call.scale <= 0:
        return lambda: (
            f"FlashAttention picks the largest score before it scales, so not by {call.scale}"
        )
    if call.attn_mask is not None:
        return lambda: "FlashAttention takes no attn_mask"
    if call.causal == "token" and not band:
        return lambda: (
            "token causality sees its own token's later pseudo-keys, which a causal mask hides"
        )
    if call.causal is None and call.window is not None and not (band and call.aligned):
        return lambda: (
            "a window to both sides is no band over virtual tokens unless P = 1 and N ends at S"
        )
    if call.causal is not None and not isinstance(call.query_offset, int):
        return lambda: "FlashAttention must know query_offset as an int"
    if call.document_ids is not None and call.query.shape[2] != call.key.shape[2]:
        return lambda: (
            "packed documents are only cut apart where query and key hold the same tokens"
        )
    return None


def _scattered(call: Call) -> Refusal | None:
    """Why the documents cannot be cut apart: sorting one row's ids would leave fewer runs."""
    ids = call.document_ids
    if ids is None or bool(_starts(ids).sum() == _starts(ids.sort(-1).values).sum()):
        return None
    return lambda: "a document that goes on after another one is no contiguous run of tokens"


def _in_parts(call: Call) -> bool:
    """Whether the virtual tokens are several bands."""
    return call.causal == "flat" and call.pseudo_queries < call.pseudo_heads


def _no_package(call: Call) -> Refusal | None:
    if _in_parts(call):
        widest, plain = 256, call.softcap is None and call.dropout_p == 0
        if plain and call.query.shape[3] <= widest and major(call) >= 8:
            return None
        return lambda: (
            "fewer pseudo-queries than pseudo-keys run in PyTorch's own FlashAttention: on Ampere"
            f" or newer, a head dimension up to {widest}, no dropout, no soft-cap"
        )
    if _package(call) is not None:
        return None

    def sentence() -> str:
        found = [package.name for package in PACKAGES if imported(package.name) is not None]
        if not found:
            names = ", ".join(package.name for package in PACKAGES)
            return f"none of the packages {names} can be imported; install one"
        wanted = [f"the head dimension {call.query.shape[3]}"]
        wanted += ["dropout"] if call.dropout_p > 0 else []
        wanted += ["a soft-cap"] if call.softcap is not None else []
        return f"on this GPU, {' and '.join(wanted)} is more than {', '.join(found)} can do"

    return sentence


def _package(call: Call) -> Package | None:
    """The first in `PACKAGES` that can do `call`; none of them combines dropout and a soft-cap."""
    if call.dropout_p > 0 and call.softcap is not None:
        return None
    for package in PACKAGES:
        fits = call.query.shape[3] <= package.widest and (package.dropout or call.dropout_p == 0)
        if fits and imported(package.name) is not None and major(call) in package.majors:
            return package
    return None


def major(call: Call) -> int:
    """The GPU's generation: 8 Ampere and Ada, 9 Hopper, 10 to 12 Blackwell."""
    return torch.cuda.get_device_capability(call.query.device)[0]


@functools.cache
def imported(name: str) -> Any:
    """The package, or None: absent, built for another PyTorch, or only the parent of another."""
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None
    return module if hasattr(module, "flash_attn_varlen_func") else None


def run(call: Call) -> Tensor:
    causal = call.causal is not None
    if causal:
        last = call.query_offset + call.query.shape[2]
        call = call.replace(key=call.key[:, :, :last], value=call.value[:, :, :last])
    if _in_parts(call):
        return merged.run(call, _of_pytorch(call))
    package = _package(call)
    assert package is not None
    flash, P, reach = imported(package.name), call.pseudo_heads, package.unlimited
    if call.window is not None:
        reach = call.window * P - 1
    options: dict[str, Any] = {
        "softmax_scale": call.scale,
        "causal": causal,
        "window_size": (reach, 0 if causal and call.window is not None else reach),
    }
    if call.softcap is not None:
        options["softcap"] = call.softcap
    if call.dropout_p > 0:
        options["dropout_p"] = call.dropout_p

    query, key, value = (virtual.transpose(1, 2) for virtual in interleaved_inputs(call))
    if call.document_ids is None:
        output = flash.flash_attn_func(query, key, value, **options)
    else:
        bounds = _bounds(call.document_ids)
        longest, Pq = int(bounds.diff().max()), call.pseudo_queries
        output = flash.flash_attn_varlen_func(
            *(virtual.flatten(0, 1) for virtual in (query, key, value)),
            cu_seqlens_q=bounds * Pq,
            cu_seqlens_k=bounds * P,
            max_seqlen_q=longest * Pq,
            max_seqlen_k=longest * P,
            **options,
        )
    # Some versions return the log-sum-exp as well.
    output = output if isinstance(output, Tensor) else output[0]
    return interleaved_output(call, output.reshape(query.shape).transpose(1, 2))


def _of_pytorch(call: Call) -> merged.Kernel:
    """PyTorch's own FlashAttention, which hands out log-sum-exps and takes them for backward."""
    importlib.import_module("torch.nn.attention.varlen")  # registers the operators
    operators: Any = torch.ops.torch_attn
    (B, _, N, _), S = call.query.shape, call.key.shape[2]
    if call.document_ids is None:
        batch = torch.arange(B + 1, dtype=torch.int32, device=call.query.device)
        bounds, longest = (batch * N, batch * S), (N, S)
    else:
        bounds = (_bounds(call.document_ids),) * 2
        longest = (int(bounds[0].diff().max()),) * 2

    def given(query: Tensor, part: merged.Part) -> tuple[list[Tensor], list[Any], list[int]]:
        # A part has as many virtual tokens for each query token as for each key token.
        count = query.shape[1] // N
        reach = -1 if call.window is None else call.window * count - 1
        sequences = [t.flatten(0, 1) for t in (query, part.key, part.value)]
        return (
            sequences,
            [*(b * count for b in (*bounds, *longest)), call.window is None],
            [reach, 0],
        )

    def forward(query: Tensor, part: merged.Part) -> tuple[Tensor, Tensor]:
        sequences, sizes, window = given(query, part)
        output, log_sum, _ = operators._varlen_attn(
            *sequences, *sizes, call.scale, window, call.heads_per_kv > 1
        )
        return output.view_as(query), log_sum.T.unflatten(0, (B, -1))

    def backward(
        gradient: Tensor, query: Tensor, part: merged.Part, output: Tensor, log_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        sequences, sizes, window = given(query, part)
        known = output.flatten(0, 1), log_sum.flatten(0, 1).T.contiguous()
        random = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout: unread
        found = operators._varlen_attn_backward(
            gradient.flatten(0, 1), *sequences, *known, *sizes, random, call.scale, window
        )
        of_query, of_key, of_value = (t.unflatten(0, (B, -1)) for t in found)
        return of_query, of_key, of_value

    return merged.Kernel(forward, backward, level_at_end=True)


def _starts(ids: Int[Tensor, "B S"]) -> Bool[Tensor, "B S"]:
    """Where a run of equal ids begins; each row begins one."""
    return torch.cat((torch.ones_like(ids[:, :1], dtype=torch.bool), ids.diff(dim=1) != 0), 1)


def _bounds(ids: Int[Tensor, "B S"]) -> Int[Tensor, " bounds"]:
    """The first token of every document in the flattened batch, then the number of tokens."""
    starts = _starts(ids).flatten().nonzero().flatten()
    return torch.cat((starts, starts.new_tensor([ids.numel()]))).int()
