"""Activation patching of single pseudo-heads, with nnsight.

Two prompts differ in one token. For each pseudo-head of a layer: if it alone gives what it gives on
the first prompt, how far does the second prompt's last logit move to that of the first?
"""

import tiny
import torch
from nnsight import NNsight

import iha.hf
from iha.backends import reference

LAYER = 0
model = iha.upcycle(tiny.model(), pseudo_heads=2, init="scratch")
clean = tiny.tokens(model, batch=1, length=8)
other = clean.clone()
other[0, 3] = (clean[0, 3] + 1) % model.config.vocab_size


def parts(ids: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    """What each pseudo-head (h, p) adds to the heads: the operator with one column of R."""
    (pattern,) = iha.attention_patterns(model, {"input_ids": ids}, [LAYER]).values()
    call, found = pattern.source, {}
    for h in range(call.collapse.shape[1]):
        for p in range(call.collapse.shape[2]):
            alone = torch.zeros_like(call.collapse)
            alone[:, h, p] = call.collapse[:, h, p]
            found[h, p] = reference.run(call.replace(collapse=alone))
    return found


traced = NNsight(model)
with torch.no_grad():
    first, second = (model(ids).logits[0, -1] for ids in (clean, other))
    token, before, after = int((first - second).abs().argmax()), parts(clean), parts(other)
    for h, p in before:
        with traced.trace(other):
            heads = traced.model.layers[LAYER].self_attn.head_mixing.output
            heads += before[h, p] - after[h, p]
            patched = traced.output.logits[0, -1, token].save()
        share = (patched - second[token]) / (first[token] - second[token])
        print(f"head {h}, pseudo-query {p}: {share:+.2f} of the difference")
