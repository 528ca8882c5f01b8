"""The entry `iha` of a model's config: what was done to it, as config.json holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from iha.call import Causality
from iha.checks import check_choice, check_flag, checked_size, checked_window
from iha.dispatch import check_backend
from iha.modules.head_mixing import Init
from iha.rotary import RopeMode, RotaryConvention

VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Everything that must be known to put the mixing tensors into a model again.

    Attributes:
        base_model: class of the base model, to which the names of layers are relative.
        pseudo_heads: name of each attention module that has mixing tensors → its P.
        pseudo_queries: the same → its Pq.
        unrotated: those of them that the model does not rotate, which have no phases either.
        rotary, rotary_start: which dimensions the model turns together, and the first of them.

    The others are arguments of `iha.upcycle`.

    Raises TypeError or ValueError, naming the attribute, for what `iha.upcycle` would not take.
    """

    base_model: str
    pseudo_heads: dict[str, int]
    pseudo_queries: dict[str, int]
    rope: RopeMode
    rotary: RotaryConvention = "half"
    rotary_start: int = 0
    unrotated: list[str] = dataclasses.field(default_factory=list[str])
    causal: Causality
    window: int | None
    init: Init
    per_head_collapse: bool
    backend: str

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if not self.pseudo_heads or not isinstance(self.pseudo_heads, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"pseudo_heads must map the name of each layer to its P, got {self.pseudo_heads!r}."
            )
        sizes = {n: checked_size("pseudo_heads", P) for n, P in self.pseudo_heads.items()}
        keep("pseudo_heads", sizes)
        queries: Any = self.pseudo_queries
        if not isinstance(queries, Mapping) or {*queries} != {*sizes}:
            raise ValueError(
                f"pseudo_queries must name the layers that pseudo_heads names, got {queries!r}."
            )
        checked = {n: checked_size("pseudo_queries", queries[n], at_most=sizes[n]) for n in sizes}
        keep("pseudo_queries", checked)
        keep("window", checked_window(self.window))
        keep("rotary_start", checked_size("rotary_start", self.rotary_start, at_least=0))
        if not isinstance(self.base_model, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"base_model must be the name of a class, got {self.base_model!r}.")
        if not isinstance(self.unrotated, list) or not {*map(str, self.unrotated)} <= {*sizes}:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"unrotated must list layers that pseudo_heads names, got {self.unrotated!r}."
            )
        check_choice("rope", self.rope, get_args(RopeMode))
        check_choice("rotary", self.rotary, get_args(RotaryConvention))
        check_choice("causal", self.causal, get_args(Causality))
        check_choice("init", self.init, get_args(Init))
        check_flag("per_head_collapse", self.per_head_collapse)
        check_backend(self.backend)

    def write(self, config: Any) -> None:
        """Make this the entry of a config."""
        config.iha = {"version": VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def read(config: Any) -> Entry | None:
        """The entry of a config, checked whole; None where there is none.

        Raises ValueError if it is damaged, or of a version that this one does not know.
        """
        raw: Any = getattr(config, "iha", None)
        if raw is None:
            return None
        try:
            if not isinstance(raw, Mapping):
                raise TypeError(f"it must be a mapping, got {raw!r}.")
            version, given = raw.get("version"), {k: v for k, v in raw.items() if k != "version"}
            if version != VERSION:
                raise ValueError(f"its version must be {VERSION}, got {version!r}.")
            known = [field.name for field in dataclasses.fields(Entry)]
            for wrong, names in (
                ("lacks", [name for name in known if name not in given]),
                ("has the unknown", [name for name in given if name not in known]),
            ):
                if names:
                    raise ValueError(f"it {wrong} {', '.join(map(repr, names))}.")
            return Entry(**given)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "the entry 'iha' of config.json is damaged, or another version of iha wrote it:"
                f" {error} Restore the file, or install the version of iha that wrote it."
            ) from None
