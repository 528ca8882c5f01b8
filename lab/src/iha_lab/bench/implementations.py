"""What runs in a case: every backend, plain attention, and the published recipe; and the check."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import iha
from iha.backends import flash, sdpa, streamed
from iha.checks import checked_call
from iha.dispatch import choose
from iha_lab.bench.cases import FLASH_MHA, MHA, RECIPE, Layer

Attention = Callable[..., Tensor]

# Entries of a dense mask over N·P x S·P that are worth a try: by memory, and on a CPU by patience.
MASK_ENTRIES = {"cpu": 2**28, "cuda": 2**33}
# Virtual scores that `reference` may write out in a check.
CHECK_SCORES = 2**25
# Largest ‖found - reference‖ / ‖reference‖, output and gradients, on the same rounded inputs.
ALLOWED = {"float64": 1e-10, "float32": 2e-5, "float16": 0.01, "bfloat16": 0.05}


def inputs(layer: Layer, device: torch.device, *, requires_grad: bool = False) -> list[Tensor]:
    """Draw query, key, value, α^Q, α^K, α^V, R, scaled so that mixing keeps the variance."""
    random = torch.Generator().manual_seed(layer.N)
    B, H, P, d = layer.B, layer.H, layer.P, layer.d
    base = [torch.randn(B, H, n, d, generator=random) for n in (layer.N, layer.keys, layer.keys)]
    mixing = [torch.randn(H, H, P, generator=random) / H**0.5 for _ in range(4)]
    dtype = getattr(torch, layer.dtype)
    return [t.to(device, dtype).requires_grad_(requires_grad) for t in base + mixing]


def backend(layer: Layer, name: str) -> Attention:
    options: Any = {"window": layer.window, "backend": name}
    return functools.partial(iha.interleaved_head_attention, **options)


def plain(layer: Layer) -> Attention:
    """Attend without IHA: global causal SDPA over the base tensors."""
    causal = not layer.decodes
    return lambda q, k, v, *_: scaled_dot_product_attention(q, k, v, is_causal=causal)


def plain_flash(package: Any) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
        tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output = package.flash_attn_func(*tensors, causal=True)
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    return attention


def window_mask(layer: Layer, device: torch.device) -> Bool[Tensor, "NP SP"]:
    """Write out which virtual tokens see which, dense, as the recipe has it."""
    index = torch.arange(layer.keys * layer.P, dtype=torch.int32, device=device)
    distance = index[-layer.N * layer.P :, None] - index
    reach = layer.keys if layer.window is None else layer.window
    return (distance >= 0) & (distance < reach * layer.P)


def recipe(layer: Layer, device: torch.device) -> Attention:
    """Mix by einsum, interleave, one SDPA, collapse by einsum (arXiv 2602.21371).

    The dense mask, where `is_causal` does not suffice, is made here, before any clock starts.
    """
    dense = layer.window is not None or layer.decodes
    mask = window_mask(layer, device) if dense else None

    def attention(*tensors: Tensor) -> Tensor:
        query, key, value, alpha_q, alpha_k, alpha_v, collapse = tensors
        virtual = (
            torch.einsum("bmnd,mhp->bhnpd", base, alpha).flatten(2, 3)
            for base, alpha in ((query, alpha_q), (key, alpha_k), (value, alpha_v))
        )
        pseudo = scaled_dot_product_attention(*virtual, attn_mask=mask, is_causal=mask is None)
        return torch.einsum("bhnpd,ohp->bond", pseudo.unflatten(2, (-1, layer.P)), collapse)

    return attention


def names(layer: Layer, device: torch.device) -> list[str]:
    """Name the implementations that run, plain attention first."""
    backends = [name for name in iha.BACKENDS if name != "reference"] + [streamed.NAME]
    packages = [FLASH_MHA] if _flash_package(device) is not None else []
    found = [MHA, *packages, RECIPE, *backends]
    return found if layer.only is None else [name for name in found if name in layer.only]


def implementation(name: str, layer: Layer, device: torch.device) -> Attention:
    if name == MHA:
        return plain(layer)
    if name == FLASH_MHA:
        return plain_flash(_flash_package(device))
    return recipe(layer, device) if name == RECIPE else backend(layer, name)


def once(attention: Attention, tensors: list[Tensor]) -> Callable[[], object]:
    """Do one forward pass, and the backward pass where the tensors ask for it."""

    def run() -> None:
        output = attention(*tensors)
        if output.requires_grad:
            torch.autograd.grad(output, tensors, output.detach(), allow_unused=True)

    return run


def refusal(name: str, layer: Layer, tensors: list[Tensor]) -> str | None:
    """Say why `name` does not run on these tensors; None if it does."""
    if name in (MHA, FLASH_MHA):
        return None
    limit = MASK_ENTRIES[tensors[0].device.type]
    entries = layer.N * layer.P * layer.keys * layer.P
    large = (
        f"its mask of N·P x S·P = {entries / 1e9:.1f}e9 entries is more than {limit / 1e9:.1f}e9"
    )
    if name == RECIPE:
        return large if layer.window is not None and entries > limit else None
    call = checked_call(*tensors, window=layer.window)
    if name != streamed.NAME:
        why_not = iha.BACKENDS[name].refusal(call)
        if why_not is not None:
            return why_not()
    runs = choose(call, name).NAME
    dense = runs.endswith(sdpa.NAME) and sdpa.needs_dense_mask(call) and entries > limit
    return large if dense else None


def check_layer(layer: Layer) -> Layer:
    """Shorten a layer to the most tokens whose scores `reference` may write."""
    pairs = CHECK_SCORES // (layer.B * layer.H * layer.P**2)
    return shortened(layer, pairs // layer.N if layer.decodes else math.isqrt(pairs))


def shortened(layer: Layer, tokens: int) -> Layer:
    """Shorten a layer to at most so many keys, with half as wide a window where it must be."""
    S = min(layer.keys, max(tokens, 2))
    window = layer.window if layer.window is None or layer.window < S else S // 2
    changes = {"S": S} if layer.decodes else {"N": S}
    return dataclasses.replace(layer, window=window, **changes)


def differences(attention: Attention, layer: Layer, device: torch.device) -> dict[str, float]:
    """Take ‖found - reference‖ / ‖reference‖ of output and, unless it decodes, gradients."""
    found: list[list[Tensor]] = []
    for run in (attention, backend(layer, "reference")):
        tensors = inputs(layer, device)
        with torch.no_grad():
            results = [run(*tensors)]
        if not layer.decodes:
            leaves = inputs(layer, device, requires_grad=True)
            try:
                output = run(*leaves)
            except ValueError:
                output = None  # it has no backward pass, so none is timed either
            if output is not None:
                results += torch.autograd.grad(output, leaves, torch.linspace(
                    -1, 1, output.numel(), device=device
                ).to(output.dtype).view_as(output))  # fmt: skip
        found.append(results)
    label = ("output", "query", "key", "value", "alpha_q", "alpha_k", "alpha_v", "collapse")
    return {
        name: float((got.double() - wanted.double()).norm() / wanted.double().norm())
        for name, got, wanted in zip(label, *found, strict=False)
    }


def _flash_package(device: torch.device) -> Any:
    """Import FlashAttention's package for a device; None where there is none."""
    if device.type != "cuda":
        return None
    major = torch.cuda.get_device_capability(device)[0]
    fit = (flash.imported(p.name) for p in flash.PACKAGES if major in p.majors)
    return next((package for package in fit if package is not None), None)
