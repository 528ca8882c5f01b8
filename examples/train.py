"""An upcycled model in transformers' Trainer.

Trainer leaves the mixing tensors out of weight decay by itself. Their learning rate is often better
higher than the body's; `iha.parameter_groups` makes the groups for an optimizer of your own.
"""

import tempfile

import tiny
import torch
from transformers import Trainer, TrainingArguments

import iha.hf

model = iha.upcycle(tiny.model(), pseudo_heads=2)
ids = tiny.tokens(model, batch=16)
rows = [{"input_ids": row, "labels": row} for row in ids]
groups = iha.parameter_groups(model, lr=1e-3, mixing_lr=1e-2, weight_decay=0.1)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=10,
        per_device_train_batch_size=4,
        logging_steps=5,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    optimizer = torch.optim.AdamW(groups)
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
