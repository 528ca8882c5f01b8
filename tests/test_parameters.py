"""The mixing tensors in a group of their own: no decay, their own learning rate, never Muon."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iha


class Model(nn.Module):
    """A model of one's own: two layers, one with its collapse as a matrix (H, P)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {
            "pseudo_heads": 3,
            "init": "scratch",
            "num_kv_heads": 2,
            "bias": True,
        }
        self.first = iha.InterleavedHeadAttention(24, 4, per_head_collapse=True, **options)
        self.second = iha.InterleavedHeadAttention(24, 4, qk_norm=True, **options)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


def loss(model: nn.Module) -> Tensor:
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    return model(x).square().mean()


def test_every_parameter_that_trains_is_in_one_group() -> None:
    model = Model()
    model.head.bias.requires_grad_(False)
    groups = iha.parameter_groups(model, lr=3e-4, mixing_lr=1e-3, weight_decay=0.1)
    assert [g["name"] for g in groups] == ["matrices", "vectors", "mixing"]
    assert [g["lr"] for g in groups] == [3e-4, 3e-4, 1e-3]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0, 0.0]
    matrices, vectors, mixing = (g["params"] for g in groups)
    assert {p.ndim for p in matrices} == {2}
    assert {p.ndim for p in vectors} == {1}
    assert {id(p) for p in mixing} == {id(p) for p in iha.mixing_parameters(model)}
    trains = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(trains) == sorted(id(p) for g in groups for p in g["params"])


def test_a_tensor_that_two_layers_share_is_there_once() -> None:
    model = Model()
    model.second.head_mixing = model.first.head_mixing
    assert len(iha.mixing_parameters(model)) == 4
    torch.optim.AdamW(iha.parameter_groups(model, lr=1e-3))


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_adamw_leaves_a_mixing_without_gradient_where_it_is(options: dict[str, Any]) -> None:
    model = Model()
    before = [p.detach().clone() for p in iha.mixing_parameters(model)]
    groups = iha.parameter_groups(model, lr=1e-2, weight_decay=0.5)
    optimizer = torch.optim.AdamW(groups, **options)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(map(torch.equal, before, iha.mixing_parameters(model)))
    assert model.head.weight.norm() < Model().head.weight.norm()


def test_muon_for_the_matrices_and_adamw_for_the_rest() -> None:
    model = Model()
    start = loss(model).item()
    matrices, *others = iha.parameter_groups(model, lr=1e-2, mixing_lr=1e-2)
    optimizers = torch.optim.Muon(matrices["params"], lr=1e-2), torch.optim.AdamW(others)
    iha.check_optimizers(model, *optimizers)
    before = [p.detach().clone() for p in iha.mixing_parameters(model)]
    for _ in range(3):
        loss(model).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss(model).item() < start
    assert not any(map(torch.equal, before, iha.mixing_parameters(model)))


def test_sorting_by_shape_is_found_out() -> None:
    """What speed-run recipes do: two dimensions or more is Muon's, and (H, P) has two."""
    model = Model()
    by_shape: list[list[Tensor]] = [[], []]
    for parameter in model.parameters():
        by_shape[parameter.ndim == 2].append(parameter)
    adam, muon = torch.optim.AdamW(by_shape[0], weight_decay=0.0), torch.optim.Muon(by_shape[1])
    with pytest.raises(ValueError, match=r"^first\.head_mixing\.collapse is in a group of Muon"):
        iha.check_optimizers(model, adam, muon)
    one = torch.optim.AdamW([{"params": by_shape[1], "use_muon": True}], weight_decay=0.0)
    with pytest.raises(ValueError, match=r"^first\.head_mixing\.collapse .* for Muon"):
        iha.check_optimizers(model, adam, one)
    with pytest.raises(
        ValueError, match=r"alpha_. .* with weight_decay=0\.01, which pulls it to 0"
    ):
        iha.check_optimizers(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"mixing\.collapse is in no optimizer"):
        iha.check_optimizers(model, adam)
    model.first.head_mixing.requires_grad_(False)
    iha.check_optimizers(model, adam)


@pytest.mark.parametrize("number", [-1.0, float("nan"), "1e-3", None, True])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_what_is_no_rate_is_refused_by_name(name: str, number: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be a"):
        iha.parameter_groups(Model(), **{"lr": 1e-3, name: number})


def test_a_model_without_mixing_is_refused() -> None:
    for function in (iha.mixing_parameters, iha.check_optimizers):
        with pytest.raises(ValueError, match=r"^model has no mixing tensors"):
            function(nn.Linear(2, 2))
