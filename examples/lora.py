"""PEFT: LoRA on the projections, the mixing tensors trained in full, saved as one adapter."""

import copy
import tempfile

import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import iha.hf

base = iha.upcycle(tiny.model(), pseudo_heads=2)
ids = tiny.tokens(base)
config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["head_mixing"])
model = get_peft_model(copy.deepcopy(base), config)
model.print_trainable_parameters()

optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
for _ in range(5):
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss:.3f}")

model.eval()
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    print("adapter gives equal logits:", torch.allclose(loaded(ids).logits, model(ids).logits))
