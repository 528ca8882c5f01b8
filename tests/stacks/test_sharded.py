"""Training over two processes: what one process computes, with trained models."""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.hf.families import trained
from tests.stacks.processes import run

pytestmark = pytest.mark.slow
IDS = torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(3))
STEPS = 4
FAMILIES = ("llama", "mistral")

Run = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]


def train(model: Any, ids: Tensor) -> Run:
    """(the losses of some steps, the first step's gradients, the weights afterwards)."""
    # Adam would divide rounding by rounding where a gradient is almost 0.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        first = first or {name: _whole(p.grad).clone() for name, p in _named(model)}
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        if distributed.is_initialized():
            distributed.all_reduce(mean)
            mean = mean / distributed.get_world_size()
        losses.append(mean.item())
    return losses, first, {name: _whole(p.detach()) for name, p in _named(model)}


def _named(model: Any) -> list[tuple[str, Any]]:
    return [(name.removeprefix("module."), p) for name, p in model.named_parameters()]


def _whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _share(ids: Tensor) -> Tensor:
    return ids.chunk(distributed.get_world_size())[distributed.get_rank()]


def in_ddp() -> list[Run]:
    return [train(DistributedDataParallel(trained(family)), _share(IDS)) for family in FAMILIES]


def in_fsdp() -> list[Run]:
    mesh, runs = init_device_mesh("cpu", (distributed.get_world_size(),)), []
    for family in FAMILIES:
        model = trained(family)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        runs.append(train(fully_shard(model, mesh=mesh), _share(IDS)))
    return runs


def whole_of_a_sharded_model() -> dict[str, Tensor]:
    model, mesh = trained("llama"), init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def test_a_full_state_dict_is_the_models_own() -> None:
    expected = trained("llama").state_dict()
    assert any("head_mixing" in name for name in expected)
    found, _ = run(whole_of_a_sharded_model)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("wrapped", [in_ddp, in_fsdp])
def test_losses_gradients_and_weights_are_those_of_one_process(wrapped: Any) -> None:
    expected = [train(trained(family), IDS) for family in FAMILIES]
    for found in run(wrapped):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def fsdp_of_half_precision() -> tuple[set[torch.dtype], list[float]]:
    """bfloat16 projections with float32 mixing: a group of their own for the mixing tensors."""
    model, mesh = trained("llama").bfloat16(), init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        mixing = layer.self_attn.head_mixing.float()
        fully_shard(mixing, mesh=mesh, mp_policy=MixedPrecisionPolicy())
        fully_shard(layer, mesh=mesh)
    losses, _, weights = train(fully_shard(model, mesh=mesh), _share(IDS))
    return {w.dtype for name, w in weights.items() if "head_mixing" in name}, losses


def test_mixing_stays_float32_in_a_sharded_half_precision_model() -> None:
    expected, _, _ = train(trained("llama"), IDS)
    for dtypes, losses in run(fsdp_of_half_precision):
        assert dtypes == {torch.float32}
        torch.testing.assert_close(losses, expected, atol=0.1, rtol=0.02)


def by_the_example(own_group: bool) -> tuple[list[str], set[torch.dtype], Run]:
    """Accelerate's own code for FSDP2, by the example's file; it asks for an accelerator before."""
    file = str(Path(__file__).parents[2] / "examples" / "fsdp2.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", file, "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    precision = arguments.mixed_precision
    assert load_config_from_file(file).mixed_precision == precision == "bf16"
    if own_group:
        arguments.fsdp_transformer_layer_cls_to_wrap = "LlamaDecoderLayer,LayerMixing"
        precision = "no"
    os.environ.update(prepare_multi_gpu_env(arguments))
    PartialState(cpu=True)  # it logs through this
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    if not own_group:
        plugin.set_mixed_precision(precision)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=mesh,
        parallelism_config=types.SimpleNamespace(fsdp_dim_names=("dp_shard",)),
        mixed_precision=precision,
        is_main_process=distributed.get_rank() == 0,
        device=torch.device("cpu"),
        process_index=distributed.get_rank(),
    )
    model = fsdp2_prepare_model(accelerator, trained("llama").bfloat16())
    groups = sorted({type(m).__name__ for m in model.modules() if isinstance(m, FSDPModule)})
    mixing = {p.dtype for name, p in model.named_parameters() if "head_mixing" in name}
    return groups, mixing, train(model, _share(IDS))


@pytest.mark.parametrize("own_group", [False, True])
def test_accelerates_config_shards_layers_and_keeps_the_mixing_float32(own_group: bool) -> None:
    expected, _, _ = train(trained("llama"), IDS)
    for groups, dtypes, (losses, _, _) in run(by_the_example, own_group):
        assert dtypes == {torch.float32}
        assert any("LlamaDecoderLayer" in name for name in groups)
        assert any("LayerMixing" in name for name in groups) == own_group
        torch.testing.assert_close(losses, expected, atol=0.1, rtol=0.02)
