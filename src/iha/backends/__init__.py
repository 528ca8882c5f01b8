"""One file a backend, each with the same three names, tested against `reference`.

    NAME                     what the user calls it
    refusal(call)            None if it can do this call; otherwise a function that says why not,
                             in a sentence that names a backend that can
    run(call) -> Tensor      the output (B, H, N, d)

`streamed` wraps another backend, so it is a class with the same three names.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from iha.backends import chunked, flash, flex, fused, local, reference, sdpa
from iha.call import Call, Refusal


@runtime_checkable
class Backend(Protocol):
    @property
    def NAME(self) -> str: ...

    def refusal(self, call: Call, /) -> Refusal | None: ...

    def run(self, call: Call, /) -> Tensor: ...


_MODULES: tuple[Backend, ...] = (reference, sdpa, local, chunked, fused, flash, flex)
BACKENDS = {backend.NAME: backend for backend in _MODULES}
