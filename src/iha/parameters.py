"""The mixing tensors as an optimizer should see them: apart from the weight matrices.

They lie around an identity, so weight decay, which pulls to 0, changes the function; and what they
map is heads, not features, so Muon's orthogonal updates are not for them, whatever their shape (the
per-head collapse is a matrix of shape (H, P)).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from iha.checks import checked_number
from iha.modules import HeadMixing


def mixing_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The mixing tensors of all layers of any model, each once.

    PEFT trains and saves them beside an adapter with `modules_to_save=["head_mixing"]`; then both
    the frozen originals and the copies that train are among them.

    Raises TypeError if the model is no module, ValueError if it has none.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    mixings = [module for module in model.modules() if isinstance(module, HeadMixing)]
    parameters = list({id(p): p for mixing in mixings for p in mixing.parameters()}.values())
    if not parameters:
        raise ValueError(
            "model has no mixing tensors; build it with iha.HeadMixing, or upcycle it first"
            " (iha.upcycle)."
        )
    return parameters


def parameter_groups(
    model: nn.Module, *, lr: float, mixing_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Three groups for an optimizer, of the parameters that train: "matrices", "vectors", "mixing".

    Matrices (two dimensions or more) decay by `weight_decay`. Vectors (biases, norms) and the
    mixing tensors do not; these have a learning rate of their own. Each group is a dict with the
    keys `name`, `params`, `lr` and `weight_decay`; one may be empty.

    >>> import iha, torch
    >>> layer = iha.InterleavedHeadAttention(64, 8, pseudo_heads=2, init="scratch", bias=True)
    >>> groups = iha.parameter_groups(layer, lr=3e-4, mixing_lr=1e-3, weight_decay=0.1)
    >>> for group in groups:
    ...     print(group["name"], len(group["params"]), group["weight_decay"])
    matrices 4 0.1
    vectors 4 0.0
    mixing 4 0.0
    >>> optimizer = torch.optim.AdamW(groups)

    With Muon, which is for the matrices between embedding and output alone:

    >>> matrices, *others = groups
    >>> muon, adam = torch.optim.Muon(matrices["params"], lr=0.02), torch.optim.AdamW(others)

    Args:
        lr: learning rate of matrices and vectors.
        mixing_lr: that of the mixing tensors; default `lr`.
        weight_decay: of the matrices.

    Raises:
        TypeError, ValueError: the model is no module; a number is none, or negative.
        ValueError: the model has no mixing tensors.
    """
    lr = checked_number("lr", lr, at_least=0)
    mixing_lr = lr if mixing_lr is None else checked_number("mixing_lr", mixing_lr, at_least=0)
    weight_decay = checked_number("weight_decay", weight_decay, at_least=0)
    mixing = {id(p) for p in mixing_parameters(model)}
    found: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "mixing": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            name = "matrices" if parameter.ndim >= 2 else "vectors"
            found["mixing" if id(parameter) in mixing else name].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": mixing_lr if name == "mixing" else lr,
            "weight_decay": weight_decay if name == "matrices" else 0.0,
        }
        for name, parameters in found.items()
    ]


def check_optimizers(model: nn.Module, *optimizers: Optimizer) -> None:
    """Raise ValueError unless every mixing tensor that trains is in good hands.

    That is one of `optimizers`, which is no Muon, and a group that does not decay. For training
    code that sorts parameters by their shape, where a mistake goes unnoticed.

    >>> import iha, torch
    >>> layer = iha.InterleavedHeadAttention(64, 8, pseudo_heads=2, init="scratch")
    >>> adam = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
    >>> iha.check_optimizers(layer, adam)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: head_mixing.alpha_q is in a group of AdamW with weight_decay=0.1, which pulls it ...
    """
    mixing = {id(p) for p in mixing_parameters(model)}
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    held: set[int] = set()
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(
                f"optimizers must be given one by one, and have param_groups, got {optimizer!r}."
            )
        kind = type(optimizer).__name__
        for group in optimizer.param_groups:
            mine = [id(p) for p in group["params"] if id(p) in mixing & names.keys()]
            held.update(mine)
            if not mine:
                continue
            if group.get("use_muon", "muon" in kind.lower()):
                raise ValueError(
                    f"{names[mine[0]]} is in a group of {kind} for Muon, whose orthogonal updates"
                    " are for weight matrices; give it to AdamW (iha.parameter_groups)."
                )
            if group.get("weight_decay"):
                raise ValueError(
                    f"{names[mine[0]]} is in a group of {kind} with"
                    f" weight_decay={group['weight_decay']}, which pulls it to 0 and not to the"
                    " identity; give it a group that does not decay (iha.parameter_groups)."
                )
    for parameter in mixing & names.keys() - held:
        raise ValueError(
            f"{names[parameter]} is in no optimizer, so it would not train; iha.parameter_groups"
            " has a group for it."
        )
