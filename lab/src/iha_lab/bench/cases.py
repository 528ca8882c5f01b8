"""What is measured, as plain data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import torch

from iha.schedule import attention_flops, hybrid_schedule

# Who runs beside the backends.
MHA = "plain SDPA"
FLASH_MHA = "plain FlashAttention"
RECIPE = "published recipe"
# The two of a training step.
PLAIN, MIXED = "plain model", "IHA model"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One attention layer: B sequences, N queries after S keys, H heads of width d, flat causality.

    `window` is in tokens, None for a global layer; `dtype` is a name in torch; `only` names
    who runs, None means all. `about` is a word to find it by.
    """

    about: str
    N: int
    H: int
    P: int
    d: int
    window: int | None
    dtype: str
    B: int = 1
    S: int | None = None
    only: tuple[str, ...] | None = None

    @property
    def keys(self) -> int:
        """S, as many as queries unless it is said."""
        return self.N if self.S is None else self.S

    @property
    def decodes(self) -> bool:
        """Queries after a cache: no backward pass."""
        return self.keys > self.N

    @property
    def itemsize(self) -> int:
        return torch.empty(0, dtype=getattr(torch, self.dtype)).itemsize

    def flops(self) -> int:
        """Count forward FLOPs of the definition itself, a multiply-add as 2.

        For a layer over a whole sequence they are `iha.attention_flops`. A decoding step has the
        pairs of its own rows, and mixes all keys that it sees.
        """
        if not self.decodes:
            shape = (self.N, self.H, self.d, self.P)
            return self.B * attention_flops(*shape, window=self.window)
        seen = self.keys if self.window is None else min(self.window, self.keys)
        pairs = (self.N * self.P) * (seen * self.P)
        mixed = 2 * (self.N + seen) * 2 * self.H**2 * self.P * self.d if self.P > 1 else 0
        return self.B * (4 * self.H * self.d * pairs + mixed)

    def predicted(self) -> float:
        """Divide the FLOPs by those of plain global attention: its time, were all FLOPs alike."""
        return self.flops() / dataclasses.replace(self, P=1, window=None).flops()

    def floor_bytes(self) -> int:
        """Count the base tensors once through memory: query, key and value in, the output out."""
        return self.B * self.H * self.d * 2 * (self.N + self.keys) * self.itemsize

    def cache_bytes(self) -> int:
        """Count base keys and values: those of plain attention."""
        return self.B * self.H * self.d * 2 * self.keys * self.itemsize

    def title(self) -> str:
        where = f"N = {self.N}" + (f" after S = {self.keys}" if self.decodes else "")
        window = "global" if self.window is None else f"W = {self.window}"
        return f"{where}, H = {self.H}, P = {self.P}, d = {self.d}, {window}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer trained from scratch on `iha.hybrid_schedule`, and its plain twin."""

    about: str
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    N: int
    P: int
    dtype: str
    B: int = 1

    def title(self) -> str:
        return (
            f"{self.num_layers} layers, hidden size {self.hidden_size}, H = {self.num_heads},"
            f" N = {self.N}, P = {self.P}, {self.dtype}"
        )


Case = tuple["Layer | Model", ...]


def paper_window(N: int, P: int) -> int:
    """Return W = N/(2P²), the window of the FLOP-matched schedule."""
    return hybrid_schedule(1, N, P).window


def _windowed(about: str, N: int, H: int, P: int, d: int, dtype: str) -> Layer:
    return Layer(about, N, H, P, d, paper_window(N, P), dtype)


def _doubled(first: int, last: int) -> Iterable[int]:
    while first <= last:
        yield first
        first *= 2


def _cpu(first: int, last: int, all_up_to: int) -> Case:
    """Double from `first` to `last` tokens; all implementations at first, few beyond `all_up_to`.

    With a window `sdpa` does what the recipe does, dense mask and all, and `streamed` runs `local`
    head by head: once is enough.
    """
    H = P = 8
    layer = functools.partial(Layer, H=H, P=P, d=64, dtype="float32")
    few = (MHA, "local")
    sizes = tuple(_doubled(first, last))
    recipe = {N: (*few, RECIPE) for N in sizes if all_up_to >= N}
    some = recipe | {first: (*few, RECIPE, "sdpa", "streamed")}
    return (
        *(layer("window", N, window=paper_window(N, P), only=some.get(N, few)) for N in sizes),
        *(layer("fixed window", N, window=16, only=("local",)) for N in sizes),
        layer("global", all_up_to, window=None, only=(MHA, "sdpa", "streamed")),
    )


CASES: dict[str, Case] = {
    "paper": tuple(_windowed("window", 8192, P, P, 128, "bfloat16") for P in (16, 20, 32)),
    "small-p": tuple(
        layer
        for P in (2, 4)
        for layer in (
            _windowed("window", 8192, 20, P, 128, "bfloat16"),
            Layer("global", 8192, 20, P, 128, None, "bfloat16"),
        )
    ),
    "decode": tuple(
        Layer("decode", 1, 20, P, 128, None, "bfloat16", S=S)
        for S in (16384, 65536)
        for P in (2, 4)
    ),
    "model": (Model("training step", 26, 2560, 20, 6912, 32000, 8192, 2, "bfloat16"),),
    "cpu": _cpu(512, 16384, 2048),
}

# The same questions at sizes that take seconds on two cores.
QUICK: dict[str, Case] = {
    "paper": (_windowed("window", 512, 4, 4, 16, "float32"),),
    "small-p": (
        _windowed("window", 256, 4, 2, 16, "float32"),
        Layer("global", 256, 4, 2, 16, None, "float32"),
    ),
    "decode": (Layer("decode", 1, 4, 2, 16, None, "float32", S=2048),),
    "model": (Model("training step", 5, 64, 4, 128, 256, 128, 2, "float32"),),
    "cpu": _cpu(128, 128, 128),
}


def default_cases(device: torch.device) -> tuple[str, ...]:
    """Return what fits: everything but `cpu` on a GPU; `cpu` on a CPU."""
    return ("cpu",) if device.type == "cpu" else tuple(name for name in CASES if name != "cpu")


def case(name: str, quick: bool) -> Case:
    """Return the rows of a case. Raises ValueError for an unknown name."""
    cases = QUICK if quick else CASES
    if name not in cases:
        names = ", ".join(CASES)
        raise ValueError(f"case must be one of {names}; got {name!r}.")
    return cases[name]
