"""Which attention a model gets: the typed part of every experiment's config."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

import pydantic


class _Choice(pydantic.BaseModel):
    model_config: ClassVar = pydantic.ConfigDict(extra="forbid", frozen=True)

    @property
    def label(self) -> str:
        """How tables and file names call it."""
        return self.kind  # type: ignore[attr-defined]


class Plain(_Choice):
    """Multi-head attention, global in every layer (Vaswani et al., arXiv 1706.03762)."""

    kind: Literal["mha"] = "mha"


class LocalGlobal(_Choice):
    """Multi-head attention with a window of W tokens in four layers of five."""

    kind: Literal["local-global"] = "local-global"
    window: int = pydantic.Field(512, ge=1)

    @property
    def label(self) -> str:
        return "local-global" if self.window == 512 else f"local-global-w{self.window}"


class TalkingHeads(_Choice):
    """Heads mixed before and after the softmax (Shazeer et al., arXiv 2003.02436)."""

    kind: Literal["talking-heads"] = "talking-heads"


class Differential(_Choice):
    """The difference of two softmax maps (Ye et al., arXiv 2410.05258)."""

    kind: Literal["differential"] = "differential"


class KnockingHeads(_Choice):
    """Feature maps shared by all heads before attention (Zhou et al., arXiv 2510.23052).

    `values` is the form of the values' map, `queries_keys` whether queries and keys have one too,
    which is linear. The default is the paper's KHA-MLP, its best; KHA-Linear is "linear" with
    `queries_keys`, which it found better for dense models.
    """

    kind: Literal["knocking-heads"] = "knocking-heads"
    values: Literal["mlp", "linear"] = "mlp"
    queries_keys: bool = False

    @property
    def label(self) -> str:
        parts = ["knocking-heads"]
        parts += ["linear"] if self.values == "linear" else []
        parts += ["queries-keys"] if self.queries_keys else []
        return "-".join(parts)


class Simplicial(_Choice):
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


class Interleaved(_Choice):
    """Interleaved Head Attention (Duvvuri et al., arXiv 2602.21371), by `iha.upcycle`.

    `init` is as in `iha.HeadMixing`: "scratch" to train from nothing, "upcycle" for the exact
    start. `schedule` limits it to `iha.hybrid_schedule`'s layers and windows, which matches FLOPs.
    """

    kind: Literal["iha"] = "iha"
    pseudo_heads: int = pydantic.Field(4, ge=1)
    rope: Literal["virtual", "token", "fractional"] = "virtual"
    collapse: Literal["full", "per-head"] = "full"
    init: Literal["scratch", "upcycle", "identity"] = "scratch"
    schedule: bool = False

    @property
    def label(self) -> str:
        parts = [f"iha-p{self.pseudo_heads}"]
        parts += [self.rope] if self.rope != "virtual" else []
        parts += ["per-head"] if self.collapse == "per-head" else []
        parts += [self.init] if self.init != "scratch" else []
        parts += ["schedule"] if self.schedule else []
        return "-".join(parts)


_Any = Plain | LocalGlobal | TalkingHeads | Differential | KnockingHeads | Simplicial | Interleaved
Choice = Annotated[_Any, pydantic.Field(discriminator="kind")]

# Every kind and a line on it.
KINDS: dict[str, str] = {
    kind.model_fields["kind"].default: (kind.__doc__ or "").splitlines()[0]
    for kind in get_args(_Any)
}
