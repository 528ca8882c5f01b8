"""The tables of docs/scale-out.md: traffic and memory of the paper's model, counted.

Traffic is what one GPU receives and sends by ring collectives; nothing here was timed.
"""

from __future__ import annotations

import dataclasses
import textwrap
from functools import cache
from typing import Any

from iha.schedule import hybrid_schedule
from iha_lab.experiments import configs, read
from iha_lab.report.tables import Table

BF16, FLOAT = 2, 4
STATES = 16  # bytes a parameter: float32 weight and gradient, Adam's two moments
GPUS = (8, 64, 128)
NODE = 8  # tensor and context parallelism stay within one


@dataclasses.dataclass(frozen=True)
class Paper:
    """The 2.4B model of arXiv 2602.21371, as the lab's config `lm/paper` builds it (G = H)."""

    layers: int
    width: int
    heads: int
    tokens: int
    pseudo_heads: int
    window: int
    windowed: int  # layers with IHA
    parameters: dict[str, int]

    @property
    def base(self) -> int:
        """Bytes of one base tensor (N, H, d) in bfloat16."""
        return self.tokens * self.width * BF16


@cache
def paper() -> Paper:
    experiment: Any = read(configs("lm")["paper"])
    models = {run.attention.label: run.model(meta=True) for run in experiment.runs()}
    config = models["mha"].config
    label = next(name for name in models if name.startswith("iha"))
    P = int(label.split("-p")[1].split("-")[0])
    schedule = hybrid_schedule(config.num_hidden_layers, experiment.seq_len, P)
    return Paper(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
        experiment.seq_len, P, schedule.window, len(schedule.layers),
        {"MHA": models["mha"].num_parameters(), "IHA": models[label].num_parameters()},
    )  # fmt: skip


def fsdp_traffic(parameters: int, ranks: int) -> float:
    """Bytes a step: weights gathered twice in bfloat16, gradients reduce-scattered in float32."""
    return parameters * (2 * BF16 + FLOAT) * (ranks - 1) / ranks


def tensor_traffic(model: Paper, ranks: int, kind: str) -> float:
    """Bytes a step and sequence: four all-reduces a layer; with IHA, Q, K, V and dO gathered too.

    transformers' plan is one for all layers of a stack, so plain layers gather as well.
    """
    moved = model.base * (ranks - 1) / ranks
    return moved * model.layers * (12 if kind == "IHA" else 8)


def context_traffic(model: Paper, ranks: int, kind: str) -> float:
    """Bytes a step and sequence: K, V forward, K, V, dK, dV backward; W tokens for a window."""
    ring = 6 * model.base * (ranks - 1) / ranks
    if kind == "MHA":
        return ring * model.layers
    halo = 4 * model.window * model.width * BF16
    return ring * (model.layers - model.windowed) + halo * model.windowed


def counted() -> str:
    """Show traffic, weights and activations of one GPU, IHA beside MHA."""
    model = paper()
    tensor_rows: list[list[str]] = []
    for gpus in GPUS:
        for name in ("FSDP2", f"TP {NODE} + FSDP2", f"CP {NODE} + FSDP2"):
            line = [str(gpus), name]
            for kind, parameters in model.parameters.items():
                shards, traffic = gpus, 0.0
                if name.startswith("TP"):
                    traffic = tensor_traffic(model, NODE, kind)
                    parameters, shards = parameters / NODE, gpus // NODE
                elif name.startswith("CP"):
                    traffic = context_traffic(model, NODE, kind)
                traffic += fsdp_traffic(int(parameters), shards)
                line += [_gib(parameters * STATES / shards), _gib(traffic)]
            tensor_rows.append(line)
    columns = ["GPUs", "", *(f"{kind}, {what}" for kind in model.parameters
                             for what in ("states", "traffic a step"))]  # fmt: skip
    P, N, W = model.pseudo_heads, model.tokens, model.window
    head = (
        f"**Estimates**, counted and not measured, for the paper's model ({model.layers} layers, of"
        f" which {model.windowed} have IHA with P = {P} and W = {W}; N = {N}, hidden size"
        f" {model.width}, {model.parameters['MHA'] / 1e9:.2f}B parameters and"
        f" {(model.parameters['IHA'] - model.parameters['MHA']) / 1e6:.2f}M of mixing). One"
        " sequence for each data-parallel group. States: float32 weights and gradients and Adam's"
        " moments, for each GPU. Traffic: what one GPU receives, weights in bfloat16, gradients in"
        f" float32; TP and CP within {NODE} GPUs, the embedding's traffic left out. CP of window"
        " layers is `iha.window_halo`."
    )
    sums = N * model.heads * P * FLOAT
    memory = [
        ["MHA, FlashAttention: Q, K, V, O", _mib(4 * model.base)],
        ["`sdpa`, `flash`: base Q, K, V, and P times Q, K, V, O", _mib((3 + 4 * P) * model.base)],
        ["`local` on a GPU: as above at least, since it keeps up to 8 chunks of 1 GiB",
         _mib((3 + 4 * P) * model.base)],
        ["`streamed`: base Q, K, V; the rest is computed again", _mib(3 * model.base)],
        ["`fused`: base Q, K, V and one float32 for each virtual query",
         _mib(3 * model.base + sums)],
    ]  # fmt: skip
    below = (
        "What autograd keeps of one IHA layer's attention, for one sequence on one GPU, also an"
        " estimate. Projections and MLP keep what they keep in MHA. FSDP2 divides none of it; TP as"
        " above divides none of IHA's, and CP divides it by its ranks:"
    )
    first, second = Table(columns, tensor_rows), Table(["attention", "activations"], memory)
    return (
        f"{textwrap.fill(head, 100)}\n\n{first.markdown()}\n\n"
        f"{textwrap.fill(below, 100)}\n\n{second.markdown()}"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _mib(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"
