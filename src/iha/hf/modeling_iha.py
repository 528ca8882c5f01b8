"""Loads an Interleaved Head Attention model with `trust_remote_code=True`, given `iha`.

This file travels with a saved model; there is no model code in it. `NAME` is transformers' own
class of that name, plus the mixing tensors that the model's config describes.
"""

import iha.hf


def __getattr__(name: str) -> type:
    return iha.hf.model_class(name)
