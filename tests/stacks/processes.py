"""Functions that run in several processes, which talk by gloo, on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing


def run(function: Callable[..., Any], *arguments: Any, world: int = 2) -> list[Any]:
    """What `function(*arguments)` returns in each of `world` processes, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_enter, (world, folder, function, arguments), nprocs=world)
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(world)]


def _enter(
    rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    torch.save(function(*arguments), Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()
