"""FlexAttention: its masks pair by pair without compiling, and a few kinds of call compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention.flex_attention import create_mask

from iha import BACKENDS, interleaved_head_attention
from iha.backends import flex
from iha.checks import checked_call
from iha.visibility import virtual_mask
from tests.arguments import NAMES, arguments, tensors

# PyTorch's compiler still uses what PyTorch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 5, 3, 3]])


@settings(max_examples=80, deadline=None)
@given(arguments())
def test_the_mask_is_that_of_the_definition(arguments: dict[str, Any]) -> None:
    call = checked_call(**arguments)
    (B, H, N, _), S, P = call.query.shape, call.key.shape[2], call.pseudo_heads
    blocks, expected = flex.block_mask(call), virtual_mask(call)
    if blocks is None:
        assert expected is None or expected.all()
        return
    assert expected is not None
    rows = N * call.pseudo_queries
    found = create_mask(blocks.mask_mod, B, H, rows, S * P, device="cpu")
    expected = expected.flatten(4, 5).flatten(2, 3).expand_as(found)
    assert torch.equal(found, expected)
    # The kernel also trusts the mask that full blocks are full and absent ones empty.
    dense = blocks.to_dense().bool().expand(B, H, -1, -1)
    assert torch.equal(dense[:, :, 0, 0], expected.flatten(2).any(-1))


def test_a_block_that_nobody_sees_is_skipped() -> None:
    given = tensors(B=1, N=512, P=2)
    blocks = flex.block_mask(checked_call(**given, window=64))
    assert blocks is not None
    near = torch.arange(8)[:, None] - torch.arange(8)
    assert torch.equal(blocks.to_dense()[0, 0] != 0, (near >= 0) & (near <= 1))


def test_a_positional_mask_is_made_once_and_for_training_too() -> None:
    given = tensors(N=10, P=2)
    with torch.inference_mode():
        first = flex.block_mask(checked_call(**given, window=3))
    assert first is flex.block_mask(checked_call(**given, window=3))
    assert first is not None
    assert not first.kv_num_blocks.is_inference()
    assert first is not flex.block_mask(checked_call(**given, window=4))


# Each of these is compiled, which takes seconds.
COMPILED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flat": ({"N": 75, "P": 2, "G": 1}, {}),
    "token, window, offset tensor, soft-cap": (
        {"N": 5, "S": 9, "G": 2},
        {"causal": "token", "window": 3, "query_offset": torch.tensor(2), "softcap": 2.0},
    ),
    "both sides, documents, mask by head with rows that see nothing": (
        {"N": 9},
        {
            "causal": None,
            "window": 4,
            "document_ids": DOCUMENTS,
            "attn_mask": torch.rand(1, 4, 9, 1, generator=torch.Generator().manual_seed(0)) < 0.6,
            "scale": 0.7,
        },
    ),
}


@pytest.mark.parametrize("case", COMPILED)
def test_it_is_the_reference(case: str) -> None:
    sizes, options = COMPILED[case]
    given = tensors(**sizes, dtype=torch.float32)
    expected = interleaved_head_attention(**given, **options, backend="reference")
    output = interleaved_head_attention(**given, **options, backend="flex")
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_half_precision_and_everything_visible() -> None:
    given = tensors(N=6, S=11, d=8, dtype=torch.bfloat16)
    expected = interleaved_head_attention(**given, causal=None, backend="reference")
    output = interleaved_head_attention(**given, causal=None, backend="flex")
    torch.testing.assert_close(output, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("options", [{"window": 3}, {"document_ids": DOCUMENTS}], ids=str)
def test_it_can_be_traced_into_a_graph(options: dict[str, Any]) -> None:
    """As on a GPU. On a CPU PyTorch 2.13 compiles it only on its own, so that is refused."""
    given = {**tensors(N=9, G=2, dtype=torch.float32), **options}
    traced = torch.compile(lambda: flex.run(checked_call(**given)), fullgraph=True, backend="eager")
    expected = interleaved_head_attention(**given, backend="reference")
    torch.testing.assert_close(traced(), expected, atol=1e-5, rtol=1e-5)
    compiled = torch.compile(interleaved_head_attention, backend="eager")
    with pytest.raises(ValueError, match=r"not inside another graph; '(sdpa|local)' can do it"):
        compiled(**given, backend="flex")


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("no dropout; 'sdpa'", {}, {"dropout_p": 0.1}),
    ("no dropout; 'local'", {}, {"dropout_p": 0.1, "window": 2}),
    ("no dropout; 'chunked'", {}, {"dropout_p": 0.1, "softcap": 1.0}),
    ("no kernel for float64; 'sdpa'", {"dtype": torch.float64}, {}),
    ("not on meta; 'sdpa'", {"device": "meta"}, {}),
    ("no backward pass on a CPU; 'sdpa'", {"requires_grad": True}, {}),
]


@pytest.mark.parametrize(("sentence", "tensor", "options"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refusals(sentence: str, tensor: dict[str, Any], options: dict[str, Any]) -> None:
    given = tensors(dtype=tensor.get("dtype", torch.float32))
    for name in NAMES:
        given[name] = given[name].to(tensor.get("device", "cpu"))
        given[name].requires_grad_(tensor.get("requires_grad", False))
    with pytest.raises(ValueError, match=sentence) as caught:
        interleaved_head_attention(**given, **options, backend="flex")
    able = str(caught.value).rsplit("'", 2)[1]
    assert BACKENDS[able].refusal(checked_call(**given, **options)) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "options", [{}, {"window": 9}, {"causal": "token", "softcap": 5.0}, {"causal": None}], ids=str
)
def test_outputs_and_gradients_on_a_gpu(options: dict[str, Any]) -> None:
    found: list[list[torch.Tensor | None]] = []
    for backend in ("flex", "reference"):
        given = tensors(N=150, G=2, d=32, P=2, dtype=torch.float32)
        leaves = {name: tensor.cuda().requires_grad_() for name, tensor in given.items()}
        output = interleaved_head_attention(**leaves, **options, backend=backend)
        output.square().mean().backward()
        found.append([output.detach(), *(leaves[name].grad for name in NAMES)])
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)
