"""Models whose parameters are split over processes: two of them, with gloo, on this machine."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import iha
from tests.hf.families import tiny
from tests.stacks.processes import run

RANKS = 2


def test_two_processes() -> None:
    """All at once: that each process imports what it needs takes the time."""
    run(checks, world=RANKS)


def checks() -> None:
    for check in (
        sharded_mixing_tensors_are_reset_alike,
        a_model_that_was_built_empty_starts_exactly,
        a_sharded_model_is_not_upcycled,
    ):
        torch.manual_seed(dist.get_rank())  # what every rank draws by itself differs
        check()


def assert_equal_on_all_ranks(tensor: torch.Tensor) -> None:
    found = [torch.empty_like(tensor) for _ in range(RANKS)]
    dist.all_gather(found, tensor.contiguous())
    assert torch.equal(found[0], found[1])


def sharded_mixing_tensors_are_reset_alike() -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    for init in ("upcycle", "scratch", "identity"):
        for per_head_collapse in (False, True):
            mixing = iha.HeadMixing(
                6, num_kv_heads=3, pseudo_heads=4, init=init, per_head_collapse=per_head_collapse,
                device="meta",
            )  # fmt: skip
            fully_shard(mixing, mesh=mesh)
            mixing.to_empty(device="cpu")
            for parameter in mixing.parameters():
                torch.nn.init.constant_(parameter, float("nan"))
            mixing.reset_parameters()
            for parameter in mixing.parameters():
                assert_equal_on_all_ranks(parameter.full_tensor())
            whole = {name: p.full_tensor() for name, p in mixing.named_parameters()}
            assert all(tensor.isfinite().all() for tensor in whole.values())
            if init == "upcycle":
                eye = torch.eye(3)
                torch.testing.assert_close(whole["alpha_v"].mean(-1), eye)
                assert torch.equal(whole["alpha_k"], eye[..., None].expand(3, 3, 4))
                assert (whole["alpha_v"] - whole["alpha_k"]).abs().max() > 0.01


def a_model_that_was_built_empty_starts_exactly() -> None:
    """As one starts a large model: on the meta device, sharded, filled."""
    ids = torch.arange(3, 12)[None]
    plain = tiny("llama")
    with torch.device("meta"):
        model = iha.upcycle(type(plain)(plain.config), 2)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, iha.HeadMixing):
            module.reset_parameters()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head_mixing" not in name:
                parameter.copy_(
                    distribute_tensor(
                        plain.get_parameter(name), parameter.device_mesh, parameter.placements
                    )
                )
        model.model.rotary_emb = plain.model.rotary_emb
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-4, rtol=0)


def a_sharded_model_is_not_upcycled() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (RANKS,)))
    with pytest.raises(ValueError, match=r"model is sharded already .* upcycle first, then shard"):
        iha.upcycle(model, 2)
    assert getattr(model.config, "iha", None) is None
