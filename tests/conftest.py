"""What holds for every test: one thread, no network, no time limits on a loaded machine."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("iha", deadline=None, print_blob=True)
settings.load_profile("iha")
