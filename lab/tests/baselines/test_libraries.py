"""Baselines against other libraries' implementations, with their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from iha_lab import baselines
from iha_lab.baselines.baseline import Inputs
from iha_lab.baselines.talking_heads import TalkingHeads
from lab.tests.baselines.models import llama_config


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_talking_heads_are_those_of_x_transformers(causal: bool, padded: bool) -> None:
    from x_transformers.attend import Attend

    torch.manual_seed(0)
    H, N, d = 4, 6, 8
    query, key, value = (torch.randn(2, H, N, d) for _ in range(3))
    theirs = Attend(heads=H, causal=causal, pre_talking_heads=True, post_talking_heads=True)
    for convolution in (theirs.pre_softmax_talking_heads, theirs.post_softmax_talking_heads):
        torch.nn.init.normal_(convolution.weight)
    ours: Any = TalkingHeads(H, H, d)
    # Its logits are J + J·P, its convolutions (out, in).
    ours.of_logits.data = torch.eye(H) + theirs.pre_softmax_talking_heads.weight[:, :, 0, 0].T
    ours.of_weights.data = theirs.post_softmax_talking_heads.weight[:, :, 0, 0].T
    real = torch.arange(N) < torch.tensor([[N], [N - 2]])
    expected, _ = theirs(query, key, value, mask=real if padded else None)
    visible = real[:, None, None].expand(2, 1, N, N)
    if causal:
        visible = visible.tril()
    out = ours(Inputs(query, key, value, visible if padded else None, causal, d**-0.5))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_differential_attention_is_that_of_diffllama(kv_heads: int) -> None:
    config = llama_config(num_key_value_heads=kv_heads, rms_norm_eps=1e-5, num_hidden_layers=3)
    torch.manual_seed(0)
    theirs = DiffLlamaForCausalLM(DiffLlamaConfig(**config.to_diff_dict())).eval()
    ours = baselines.equip(LlamaForCausalLM(config).eval(), baselines.DifferentialConfig())
    weights = {
        name.replace("lambda_", "baseline.lambda_"): weight
        for name, weight in theirs.state_dict().items()
    }
    ours.load_state_dict(weights)
    same(ours, theirs)


def test_gated_attention_is_that_of_qwen3_next() -> None:
    sizes = {**llama_config(num_hidden_layers=1).to_diff_dict(), "head_dim": 8}
    config = Qwen3NextConfig(
        **{
            **sizes,
            "layer_types": ["full_attention"],
            "mlp_only_layers": [0],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
            },
        }
    )
    torch.manual_seed(0)
    theirs = Qwen3NextForCausalLM(config).eval()
    plain = Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
    ours = baselines.equip(plain, baselines.GatedConfig())
    weights: dict[str, Any] = {}
    for name, weight in theirs.state_dict().items():
        if name.endswith("q_proj.weight"):
            # One projection to each head's query and gate, side by side.
            query, gate = weight.unflatten(0, (4, 2, 8)).unbind(1)
            weights[name] = query.flatten(0, 1)
            weights[name.replace("q_proj", "baseline.gate")] = gate.flatten(0, 1)
        else:
            weights[name] = weight + 1 if "norm" in name else weight  # its norms store w − 1
    ours.load_state_dict(weights)
    same(ours, theirs)


def same(ours: Any, theirs: Any) -> None:
    """In logits, with padding and without, and when they decode."""
    tokens = torch.randint(3, 99, (2, 9))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for arguments in ({}, {"attention_mask": mask}):
        expected = theirs(tokens, **arguments).logits
        found = ours(tokens, **arguments).logits
        real = arguments.get("attention_mask", torch.ones_like(tokens)).bool()
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    options: Any = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    assert torch.equal(ours.generate(tokens, **options), theirs.generate(tokens, **options))
