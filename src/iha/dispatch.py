"""Which backend runs a call, and the sentence that says why."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from iha.backends import BACKENDS, Backend, chunked, context_parallel, fused, sdpa, streamed
from iha.call import Call
from iha.checks import checked_call

# What "auto" never takes, and why.
ONLY_NAMED = {
    fused.NAME: "it can, but no GPU has run its kernels yet, so it only runs when it is named",
    streamed.NAME: "it trades time for memory, so it only runs when it is named",
}


@dataclasses.dataclass(frozen=True)
class BackendChoice:
    """Which backend would run (`chosen`), and for every other one, by name, why not."""

    chosen: str
    why_not: dict[str, str]

    def __str__(self) -> str:
        lines = (f"  not {name}: {why}" for name, why in self.why_not.items())
        return "\n".join((f"{self.chosen} runs", *lines))


def explain_backend(*arguments: Any, backend: str = "auto", **keywords: Any) -> BackendChoice:
    """Say which backend `iha.interleaved_head_attention` would use for the very same arguments.

    Raises what the operator itself would raise for them.
    """
    call = checked_call(*arguments, **keywords)
    chosen = choose(call, backend)
    named = f"{chosen.NAME} was named" if backend != "auto" else f"{chosen.NAME} is preferred here"
    why_not = {
        name: why() if (why := able.refusal(call)) else ONLY_NAMED.get(name, f"it can, but {named}")
        for name, able in BACKENDS.items()
        if name != chosen.NAME
    }
    if not isinstance(chosen, streamed.Streamed):
        why_not[streamed.NAME] = ONLY_NAMED[streamed.NAME]
    return BackendChoice(chosen.NAME, why_not)


def check_backend(name: str) -> None:
    """Raise ValueError unless `name` is "auto", a backend, or "streamed:" and one of those."""
    *outer, inner = str(name).split(":")
    if inner not in ("auto", *BACKENDS, streamed.NAME) or {*outer} - {streamed.NAME}:
        names = ", ".join(map(repr, ("auto", *BACKENDS, streamed.NAME, "streamed:NAME")))
        raise ValueError(f"backend must be one of {names}, got {name!r}.")


def choose(call: Call, name: str) -> Backend:
    """The backend called `name`, if it can do `call`; the best that can for `"auto"`."""
    check_backend(name)
    outer, _, inner = name.partition(":")
    if outer == streamed.NAME:
        # What runs inside is asked about what it will be given: a few of the heads.
        return streamed.Streamed(choose(next(streamed.chunks(call)), inner or "auto"))
    if context_parallel.active():
        why_not = context_parallel.refusal(call, name)
        if why_not is not None:
            raise ValueError(f"within context parallelism this call is wrong: {why_not}.")
        return BACKENDS[sdpa.NAME]
    if name == "auto":
        return _best(call)
    why_not = BACKENDS[name].refusal(call)
    if why_not is not None:
        raise ValueError(f"backend {name!r} cannot run this call: {why_not()}.")
    return BACKENDS[name]


def _best(call: Call) -> Backend:
    return next(
        backend for name in _preference(call) if (backend := BACKENDS[name]).refusal(call) is None
    )


def _preference(call: Call) -> tuple[str, ...]:
    """The fast backends, best first."""
    if chunked.suits(call):
        return ("chunked",)
    if not call.query.is_cuda:
        # Flex on a CPU would spend its time compiling.
        if call.window:
            return ("local",)
        # Chunks leave out what causality hides and need no mask of all pairs, which pays in long
        # calls. But autograd would keep each, and a compiler makes one of them.
        kept = call.requires_grad or torch.compiler.is_compiling()
        if not kept and call.query.shape[2] > 4 * chunked.BLOCK and sdpa.needs_dense_mask(call):
            return ("chunked",)
        return ("sdpa", "chunked")
    if call.window:
        return ("flash", "flex", "local")
    if sdpa.needs_dense_mask(call):
        return ("flash", "flex", "sdpa", "chunked")
    return ("flash", "sdpa", "flex", "chunked")
