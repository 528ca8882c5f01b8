"""Bytes counted, against the tensors that a forward pass makes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import iha
from iha_lab.bench.traffic import moved
from tests.arguments import tensors

LEAST = 4 * 64 * 8 * 4  # bytes of a base tensor: what is smaller are tables and mixing tensors


class Written(TorchDispatchMode):
    """Bytes of all large tensors that operators make, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.known: list[torch.UntypedStorage] = []  # alive, so that no address comes twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)}
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.known.append(tensor.untyped_storage())
                size = tensor.untyped_storage().nbytes()
                self.bytes += size if size >= LEAST else 0
        return found


@pytest.mark.parametrize("P", [2, 4])
def test_as_many_bytes_are_written_as_counted(P: int) -> None:
    given = tensors(B=1, H=4, N=64, d=8, P=P, dtype=torch.float32)
    with Written() as written, torch.no_grad():
        iha.interleaved_head_attention(**given, backend="sdpa")
    # Written are 3 pseudo tensors, the pseudo-outputs, the collapsed and the returned outputs.
    base = LEAST
    assert written.bytes == 4 * P * base + 2 * base
    counted = moved(64, 4, 4, 8, P, phase=False)
    assert counted == 8 * P * base + 4 * base  # and each pseudo tensor is read once


def test_copies_and_fewer_queries() -> None:
    with_copies, without = (moved(64, 4, 2, 8, 4, copies=c) for c in (True, False))
    base = 64 * 8 * 4
    assert with_copies - without == 2 * 4 * (4 + 2 + 2 + 4) * base
    assert moved(64, 4, 2, 8, 4, pseudo_queries=1) < without
