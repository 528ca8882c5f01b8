"""Bad arguments are refused here, by name, before anything runs.

First what every part of the library asks of a size, a number, a name, a flag, a tensor; each
function returns the argument as Python has it (an `int`, a `float`), so that what was `np.int64`
can be written as JSON. Then the whole call of the operator.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Collection
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from iha.call import Call, Causality, Layout
from iha.rotary import Phase, RotaryConvention

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST = 1e18  # of a scale or a soft-cap: scores stay far below what float32 holds
NOISIEST = 1e4  # of a standard deviation: five of them are a number of float16
BASE = ("query", "key", "value")
DIMENSIONS = {"bhsd": "batch, heads, tokens", "bshd": "batch, tokens, heads"}
MOST = 2**31 - 1  # of anything that is counted; a window may be as long as an int64

Choice = TypeVar("Choice")


def checked_size(name: str, size: Any, *, at_least: int = 1, at_most: int = MOST) -> int:
    """`size` as an int; numpy's integers too, but no bool, no 2.0, no tensor.

    Raises TypeError for what is no integer, ValueError for one that is out of range.
    """
    if isinstance(size, torch.SymInt):
        return size  # type: ignore[return-value]  # a length of a graph: an int for all purposes
    if isinstance(size, bool) or not isinstance(size, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an integer, got {_described(size)}.")
    size = int(size)
    if not at_least <= size <= at_most:
        bound = f"at least {at_least}" if size < at_least else f"at most {at_most}"
        raise ValueError(f"{name} must be {bound}, got {size}.")
    return size


def checked_number(
    name: str,
    number: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """`number` as a finite float within the bounds; no bool, no string, no tensor.

    Raises TypeError for what is no real number, ValueError for one that is out of bounds, or NaN.
    """
    if isinstance(number, bool) or not isinstance(
        number, (float, int, torch.SymInt, torch.SymFloat, numbers.Real)
    ):
        raise TypeError(f"{name} must be a number, got {_described(number)}.")
    try:
        found = float(number)
    except OverflowError:
        found = math.inf
    if at_least <= found and above < found < below:
        return found
    bounds = [("at least", at_least), ("above", above), ("below", below)]
    wanted = " and".join(f" {word} {bound}" for word, bound in bounds if math.isfinite(bound))
    raise ValueError(f"{name} must be a finite number{wanted}, got {reprlib.repr(number)}.")


def checked_window(window: Any) -> int | None:
    """`window` tokens, or None for none; with the errors of `checked_size`."""
    return None if window is None else checked_size("window", window, at_most=2**63 - 1)


def checked_noise(name: str, noise: Any) -> float:
    """A standard deviation of mixing tensors; with the errors of `checked_number`."""
    return checked_number(name, noise, at_least=0, below=NOISIEST)


def check_choice(name: str, given: Any, allowed: Collection[str | None]) -> None:
    """Raise unless `given` is one of `allowed`."""
    if not (given is None or isinstance(given, str)) or given not in allowed:
        wanted = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} must be one of {wanted}; got {reprlib.repr(given)}.")


def check_flag(name: str, flag: Any) -> None:
    """Raise unless `flag` is True or False."""
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {_described(flag)}.")


def check_factory(device: Any, dtype: Any) -> None:
    """Raise unless parameters can be made on `device` in `dtype`; None is PyTorch's default."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATS):
        names = ", ".join(map(str, FLOATS))
        raise TypeError(f"dtype must be one of {names}, or None; got {reprlib.repr(dtype)}.")
    try:
        if device is not None:
            torch.empty(0, device=device)
    except Exception as error:  # each backend of PyTorch has a type of its own for "not here"
        raise ValueError(
            "device must be a torch.device that this machine has, or the name of one such as 'cpu'"
            f" or 'cuda:0'; got {reprlib.repr(device)}."
        ) from error


def check_tensor(name: str, tensor: Any) -> None:
    """Raise TypeError unless `tensor` is an ordinary one: strided, and of real numbers or bools."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_described(tensor)}.")
    if tensor.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one; pad it to one length, or pack the"
            " sequences and give document_ids."
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}.")


def check_heads(name: str, tensor: Any, layout: str = "bhsd") -> None:
    """Raise unless `tensor` is one of floating numbers with the four dimensions of `layout`."""
    check_tensor(name, tensor)
    if tensor.ndim != 4:
        raise ValueError(
            f"{name} must have the 4 dimensions ({DIMENSIONS[layout]}, head dimension),"
            f" got shape {_shape(tensor)}."
        )
    if 0 in tensor.shape[1:]:
        raise ValueError(
            f"{name} must have at least one head, token and dimension, got shape {_shape(tensor)}."
        )
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating tensor, got {tensor.dtype}.")


def _described(value: object) -> str:
    return f"{type(value).__name__}: {reprlib.repr(value)}"


def checked_call(
    *tensors: Any,
    query_offset: Any = None,
    scale: Any = None,
    is_causal: Any = None,
    layout: Any = "bhsd",
    **options: Any,
) -> Call:
    """The arguments of `iha.interleaved_head_attention` as a `Call`, or a ValueError/TypeError.

    Fills in the two defaults that depend on shapes, and drops what says nothing: a window as long
    as the sequence limits no pair.
    """
    check_choice("layout", layout, get_args(Layout))
    call = Call(*tensors, **options)
    query = call.query
    B, H, N, d, G, S = _base_sizes(call, layout)
    P = _mixing_sizes(call, H, G)
    if layout == "bshd":
        call = call.replace(**{name: getattr(call, name).transpose(1, 2) for name in BASE})
    check_choice("causal", call.causal, (*get_args(Causality), None))
    if is_causal is not None:
        check_flag("is_causal", is_causal)
        if is_causal != (call.causal is not None):
            fits = "True goes with 'flat' or 'token', False with None"
            raise ValueError(f"is_causal={is_causal} contradicts causal={call.causal!r}; {fits}.")
    check_choice("rotary", call.rotary, get_args(RotaryConvention))
    window, softcap = checked_window(call.window), call.softcap
    if S < N and (call.causal or window or call.document_ids is not None):
        raise ValueError(
            "key must have at least as many tokens as query where causal, window or document_ids"
            f" relate their positions, got {S} and {N}; causal=None is cross-attention."
        )
    if call.attn_mask is not None:
        call = call.replace(attn_mask=_checked_mask(call.attn_mask, query, (B, H, N, S)))
    if call.document_ids is not None:
        _check_documents(call.document_ids, query, (B, S))
    if call.phase is not None:
        _check_phase(call.phase, query, P, d)
    return call.replace(
        window=None if window is not None and known(window >= S) else window,
        query_offset=_checked_offset(query_offset, query, N, S),
        dropout_p=checked_number("dropout_p", call.dropout_p, at_least=0, below=1),
        scale=1 / math.sqrt(d) if scale is None else _checked_scale(scale),
        softcap=None
        if softcap is None
        else checked_number("softcap", softcap, at_least=1 / LARGEST, below=LARGEST),
    )


def _base_sizes(call: Call, layout: Layout) -> tuple[int, int, int, int, int, int]:
    query, key, value = call.query, call.key, call.value
    at, other = (1, 2) if layout == "bhsd" else (2, 1)
    for name in ("alpha_q", "alpha_k", "alpha_v", "collapse"):
        check_tensor(name, getattr(call, name))
    mixed_by = ((call.alpha_q, call.collapse), *[(call.alpha_k, call.alpha_v)] * 2)
    for name, tensor, mixing in zip(BASE, (query, key, value), mixed_by, strict=True):
        check_heads(name, tensor, layout)
        known_heads = {m.shape[0] if m.ndim > 1 else 0 for m in mixing}
        heads = known_heads.pop() if len(known_heads) == 1 else 0
        if tensor.shape[at] != heads and tensor.shape[other] == heads:
            right = "bshd" if layout == "bhsd" else "bhsd"
            raise ValueError(
                f"{name} must be ({DIMENSIONS[layout]}, head dimension) for layout={layout!r}, with"
                f" {heads} heads, got shape {_shape(tensor)}; that is layout={right!r}."
            )
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"query, key and value must share a dtype, got {query.dtype} for query and"
                f" {tensor.dtype} for {name}."
            )
        _check_device(name, tensor, query)
    B, d, H, N = query.shape[0], query.shape[3], query.shape[at], query.shape[other]
    G, S = key.shape[at], key.shape[other]
    if key.shape != value.shape:
        raise ValueError(
            f"value must have the shape of key, got {_shape(value)} and {_shape(key)}."
        )
    if key.shape[0] != B or key.shape[3] != d:
        raise ValueError(
            "key must have the batch size and head dimension of query,"
            f" got key {_shape(key)} and query {_shape(query)}."
        )
    if H % G:
        raise ValueError(
            f"key must have a number of heads that divides query's, got {G} and {H}"
            f" (key {_shape(key)}, query {_shape(query)})."
        )
    return B, H, N, d, G, S


def _mixing_sizes(call: Call, H: int, G: int) -> int:
    query, alpha_q, alpha_k = call.query, call.alpha_q, call.alpha_k
    for name, tensor in (("alpha_q", alpha_q), ("alpha_k", alpha_k)):
        if tensor.ndim == 3 and tensor.shape[2] < 1:
            raise ValueError(f"{name} must have at least one pseudo-head, got {_shape(tensor)}.")
    Pq, P = (t.shape[2] if t.ndim == 3 else 1 for t in (alpha_q, alpha_k))
    if Pq > P:
        raise ValueError(
            f"alpha_k must have at least the Pq = {Pq} pseudo-heads of alpha_q,"
            f" got shape {_shape(alpha_k)}."
        )
    wanted = {
        "alpha_q": (alpha_q, ((H, H, Pq),)),
        "alpha_k": (alpha_k, ((G, G, P),)),
        "alpha_v": (call.alpha_v, ((G, G, P),)),
        "collapse": (call.collapse, ((H, H, Pq), (H, Pq))),
    }
    for name, (tensor, shapes) in wanted.items():
        if tuple(tensor.shape) not in shapes:
            raise ValueError(
                f"{name} must have shape {' or '.join(map(str, shapes))} for {H} query heads,"
                f" {G} key/value heads, the P = {P} of alpha_k and the Pq = {Pq} of alpha_q,"
                f" got {_shape(tensor)}."
            )
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be a floating tensor, got {tensor.dtype}.")
        _check_device(name, tensor, query)
    return P


def _checked_mask(attn_mask: Tensor, query: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """`attn_mask` with four dimensions: (N, S) holds for all sequences and heads, as in SDPA."""
    check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool:
        raise TypeError(
            f"attn_mask must be boolean, True = attend, got {attn_mask.dtype};"
            " additive biases are not part of the operator."
        )
    _check_device("attn_mask", attn_mask, query)
    mask = attn_mask[None, None] if attn_mask.ndim == 2 else attn_mask
    fits = mask.ndim == 4 and all(
        size in (1, full) for size, full in zip(mask.shape, sizes, strict=True)
    )
    if not fits:
        padding = attn_mask.ndim == 2 and tuple(attn_mask.shape) == (sizes[0], sizes[3])
        instead = "; give a padding mask as mask[:, None, None, :]" if padding else ""
        raise ValueError(
            "attn_mask must broadcast to (batch, heads, query tokens, key tokens) ="
            f" {sizes} with 4 dimensions, or be (query tokens, key tokens),"
            f" got {_shape(attn_mask)}{instead}."
        )
    return mask


def _check_documents(document_ids: Tensor, query: Tensor, sizes: tuple[int, int]) -> None:
    check_tensor("document_ids", document_ids)
    if not _is_integer(document_ids.dtype):
        raise TypeError(f"document_ids must be integers, got {document_ids.dtype}.")
    if tuple(document_ids.shape) != sizes:
        raise ValueError(
            f"document_ids must have shape (batch, key tokens) = {sizes},"
            f" got {_shape(document_ids)}."
        )
    _check_device("document_ids", document_ids, query)


def _check_phase(phase: Phase, query: Tensor, P: int, d: int) -> None:
    if not isinstance(phase, tuple) or len(phase) != 2:  # pyright: ignore[reportUnnecessaryIsInstance, reportUnnecessaryComparison]
        count = f" of {len(phase)}" if isinstance(phase, tuple) else ""
        raise TypeError(
            f"phase must be a pair (cos, sin) of tensors, got {type(phase).__name__}{count}."
        )
    for name, table in zip(("phase[0] (cos)", "phase[1] (sin)"), phase, strict=True):
        check_tensor(name, table)
        if not table.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating tensor, got {table.dtype}.")
        if table.ndim != 2 or table.shape[0] != P or not 1 <= table.shape[1] <= d // 2:
            raise ValueError(
                f"{name} must have shape ({P}, r/2) with r at most the head dimension {d},"
                f" got {_shape(table)}."
            )
        _check_device(name, table, query)
    if phase[0].shape != phase[1].shape:
        raise ValueError(
            f"phase must hold two tables of one shape, got {_shape(phase[0])} (cos) and"
            f" {_shape(phase[1])} (sin)."
        )


def _checked_scale(scale: Any) -> float:
    scale = checked_number("scale", scale, above=-LARGEST, below=LARGEST)
    # A kernel computes in float32, where less than that is no number that it can rely on.
    return 0.0 if abs(scale) < torch.finfo(torch.float32).tiny else scale


def _checked_offset(
    query_offset: int | Tensor | None, query: Tensor, N: int, S: int
) -> int | Tensor:
    if query_offset is None:
        return torch.sym_max(S - N, 0)  # type: ignore[return-value]  # cross-attention has no common positions
    if isinstance(query_offset, Tensor):
        check_tensor("query_offset", query_offset)
        # Its value is not read: that would stall the device and break a compiled graph.
        if query_offset.numel() != 1 or not _is_integer(query_offset.dtype):
            raise ValueError(
                "query_offset must be an int or an integer tensor with one element,"
                f" got {query_offset.dtype} of shape {_shape(query_offset)}."
            )
        _check_device("query_offset", query_offset, query)
        return query_offset.reshape(())
    query_offset = checked_size("query_offset", query_offset, at_least=-MOST)
    if not 0 <= query_offset <= S - N:
        raise ValueError(
            f"query_offset must be between 0 and S - N = {S - N}, so that all {N} query tokens"
            f" lie within the {S} key tokens; got {query_offset}."
        )
    return query_offset


def known(condition: bool) -> bool:
    """`condition`; in a graph of any length, whether it holds for all of them."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(
            f"{name} must be on the device of query, got {tensor.device} and {query.device}."
        )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
