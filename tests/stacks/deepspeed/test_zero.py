"""DeepSpeed's ZeRO stages over two processes: the losses of one process, with a trained model.

Needs DeepSpeed, in an environment of its own: `make test-stacks`.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import distributed

from tests.hf.families import trained
from tests.stacks.processes import run

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")
IDS = torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(3))
STEPS = 4


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)  # Adam would forgive gradients of any scale


def in_one_process() -> list[float]:
    model = trained("llama")
    optimizer = optimizer_of(model)
    losses: list[float] = []
    for _ in range(STEPS):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def in_zero(stage: int) -> list[float]:
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_RANK": str(distributed.get_rank()),
        "RANK": str(distributed.get_rank()),
        "WORLD_SIZE": str(distributed.get_world_size()),
        "LOCAL_WORLD_SIZE": str(distributed.get_world_size()),
    }
    import deepspeed
    from deepspeed.comm import torch as backend

    backend.build_shm_op = lambda: None  # a faster all-reduce, compiled for minutes at first use
    model = trained("llama")
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer_of(model),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,  # by default DeepSpeed clips to a norm of 1, for any model
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,
            },
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )
    ids = IDS.chunk(distributed.get_world_size())[distributed.get_rank()]
    losses: list[Any] = []
    for _ in range(STEPS):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach()
        distributed.all_reduce(mean)
        losses.append(mean.item() / distributed.get_world_size())
    return losses


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_are_those_of_one_process(stage: int) -> None:
    expected = in_one_process()
    assert expected[-1] < expected[0]
    for losses in run(in_zero, stage):
        assert losses == pytest.approx(expected, abs=2e-5)
