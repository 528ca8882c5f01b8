"""A pretrained model becomes IHA, computes the same function, is saved and loaded."""

import tempfile

import tiny
import torch
from transformers import AutoModelForCausalLM

import iha.hf  # registers IHA with transformers

model = tiny.model()
ids = tiny.tokens(model)
with torch.no_grad():
    before = model(ids).logits
    iha.upcycle(model, pseudo_heads=4)
    after = model(ids).logits
print(f"largest difference of the logits: {(after - before).abs().max():.1e}")
print(f"mixing tensors: {sum(p.numel() for p in iha.mixing_parameters(model))} parameters")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        print("loaded model gives equal logits:", torch.equal(loaded(ids).logits, after))
