"""torchtitan's trainer in processes without a GPU, and what is seen of its steps."""

from __future__ import annotations

import dataclasses
import importlib
import os
import socket
import types
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import spmd_types as spmd
import torch
import torchtitan.tools.utils as utils
from torch import Tensor
from torch.nn import functional


class _Device(types.ModuleType):
    """What torchtitan asks of `torch.cuda`, for a CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def get_device_name(self, *_: Any) -> str:
        return "cpu"

    def get_device_properties(self, *_: Any) -> Any:
        return types.SimpleNamespace(total_memory=2**34)

    def memory_stats(self, *_: Any) -> dict[str, int]:
        return {}

    def current_device(self) -> int:
        return 0

    def set_device(self, *_: Any) -> None: ...
    def reset_peak_memory_stats(self, *_: Any) -> None: ...
    def empty_cache(self) -> None: ...


# Without a GPU it would take CUDA. This comes before the imports that take these names from there.
utils.device_type, utils.device_module = "cpu", _Device("cpu")
utils.get_local_device = lambda: torch.device("cpu")

import torchtitan.models.common.attention as attention  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config import ConfigManager  # noqa: E402

_divide = FSDPModule.set_gradient_divide_factor


def _sum(self: Any, factor: float) -> None:
    self.set_force_sum_reduction_for_comms(True)  # gloo has no other
    _divide(self, factor)


FSDPModule.set_gradient_divide_factor = _sum


def _plain(
    self: Any,
    q_BLNH: Tensor,
    k_BLNH: Tensor,
    v_BLNH: Tensor,
    *,
    attention_masks: Any,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What VarlenAttention computes, whose kernel is for GPUs."""
    B, L = q_BLNH.shape[:2]
    with spmd.no_typecheck():
        tokens = torch.arange(B * L)
        of = torch.searchsorted(attention_masks.cu_seq_q, tokens, right=True).view(B, 1, L)
        mask = (of[..., None] == of[..., None, :]) & torch.ones(L, L, dtype=torch.bool).tril()
        heads = (t.transpose(1, 2) for t in (q_BLNH, k_BLNH, v_BLNH))
        sdpa = functional.scaled_dot_product_attention
        return sdpa(*heads, mask, scale=scale, enable_gqa=enable_gqa).transpose(1, 2)


attention.VarlenAttention.forward = _plain


def spec(family: str) -> Any:
    """Three layers of the debug model, without the scaling that Llama 3.1's positions have."""
    models = importlib.import_module(f"torchtitan.models.{family}")
    spec = models.model_registry("debugmodel", attn_backend="varlen")
    del spec.model.layers[3:]
    for layer in spec.model.layers:
        layer.attention.rope.scaling, layer.attention.rope.max_seq_len = "none", 128
    return spec


def _config(family: str) -> Any:
    registry = importlib.import_module(f"torchtitan.models.{family}.config_registry")
    config = getattr(registry, f"{family}_debugmodel")()
    config.model_spec, training = spec(family), config.training
    training.seq_len, training.max_norm, training.steps, training.local_batch_size = 32, 1e9, 3, 2
    training.mixed_precision_param, training.disable_cuda_graphs = "float32", True
    config.validator.enable, config.checkpoint.enable, config.debug.seed = False, False, 1
    config.optimizer.implementation = "for-loop"
    # Adam would divide rounding by rounding where a gradient is almost 0.
    config.optimizer.param_groups[0].optimizer_kwargs["eps"] = 1e-3
    config.dataloader, config.tokenizer = Batches.Config(), NoTokenizer.Config()
    return config


def llama3() -> Any:
    return _config("llama3")


def qwen3() -> Any:
    return _config("qwen3")


def batch(step: int, sequences: int, tokens: int) -> tuple[Tensor, Tensor]:
    """(ids, positions): two documents in each sequence, cut at a place of its own."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 2000, (sequences, tokens + 1), generator=draw)
    cuts = torch.randint(2, tokens - 2, (sequences, 1), generator=draw)
    place = torch.arange(tokens)
    return ids, torch.where(place < cuts, place, place - cuts)


class Batches(BaseDataLoader):
    """The same batch of each step, whatever processes share it."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config): ...

    def __init__(self, config: Any, *, dp_world_size: int, dp_rank: int, **given: Any) -> None:
        self.step, self.rank, self.world = 0, dp_rank, dp_world_size
        self.tokens, self.mine = given["seq_len"], given["local_batch_size"]

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            ids, positions = batch(self.step, self.mine * self.world, self.tokens)
            self.step += 1
            ids, positions = (t.chunk(self.world)[self.rank] for t in (ids, positions))
            yield {"input": ids[:, :-1], "positions": positions}, ids[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]


class NoTokenizer(BaseTokenizer):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config): ...

    def __init__(self, config: Any, **_: Any) -> None: ...
    def encode(self, *_: Any, **__: Any) -> list[int]: ...
    def decode(self, *_: Any, **__: Any) -> str: ...
    def get_vocab_size(self) -> int: ...


@dataclasses.dataclass
class Seen:
    """Of each step the loss; of the first all gradients; the parameters in the end."""

    losses: list[float] = dataclasses.field(default_factory=list)
    gradients: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    parameters: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def _whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _named(trainer: Any) -> list[tuple[str, Any]]:
    wrapped = ("_checkpoint_wrapped_module.", "_orig_mod.")
    named = [pair for part in trainer.model_parts for pair in part.named_parameters()]
    return [(name.replace(wrapped[0], "").replace(wrapped[1], ""), p) for name, p in named]


@torch.no_grad()
def _fill(trainer: Any) -> None:
    """The same weights whatever the layout, with a mixing that is far from its start."""
    for name, parameter in _named(trainer):
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        full = torch.randn(parameter.shape, generator=draw)
        if "inner_attention" in name:
            eye = torch.eye(full.shape[0])[:, :, None]
            full = 0.3 * full + (eye / full.shape[2] if "collapse" in name else eye)
        else:
            full = torch.ones_like(full) if full.ndim == 1 else 0.05 * full
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements)
        parameter.copy_(full)


def train(words: Sequence[str], *, fill: bool = True) -> Seen:
    """Train by the command line's words, in a process that has torchrun's variables."""
    config = ConfigManager().parse_args(["--module", __name__, *words])
    trainer, seen = config.build(), Seen()
    if fill:
        _fill(trainer)
    step, log = trainer.optimizers.step, trainer.metrics_processor.log

    def first_gradients(*given: Any, **more: Any) -> Any:
        if not seen.gradients:
            seen.gradients = {name: _whole(p.grad) for name, p in _named(trainer)}
        return step(*given, **more)

    def losses(number: int, loss: float, *given: Any, **more: Any) -> None:
        seen.losses.append(loss)
        log(number, loss, *given, **more)

    trainer.optimizers.step, trainer.metrics_processor.log = first_gradients, losses
    trainer.train()
    seen.parameters = {name: _whole(p) for name, p in _named(trainer)}
    trainer.close()
    return seen


def _enter(rank: int, world: int, port: int, folder: str, words: Sequence[str], more: Any) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="localhost")
    os.chdir(folder)
    torch.save(dataclasses.asdict(train(words, **more)), f"{rank}.pt")
    torch.distributed.destroy_process_group()


def run(words: Sequence[str], folder: Path, *, world: int = 1, **more: Any) -> Seen:
    """What rank 0 saw of `train` in `world` processes, whose working folder is `folder`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_enter, (world, port, str(folder), words, more), nprocs=world)
    return Seen(**torch.load(folder / "0.pt"))
