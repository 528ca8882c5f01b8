"""The key-value cache of one layer: base keys and values, as in any model without IHA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iha.checks import check_heads, checked_size, checked_window

if TYPE_CHECKING:
    from jaxtyping import Float


class KeyValueCache:
    """Base keys (rotated) and values of the tokens seen so far, each (B, G, S, d).

    Mixing happens on the way out, so nothing in here knows about pseudo-heads: the cache is P times
    smaller than one of pseudo-keys and -values would be.

    With `capacity` the memory for that many tokens is allocated once and written in place, so it is
    for inference, under `torch.no_grad`; without, the cache grows. With `window` = W it keeps the
    last W + 1 tokens, which is what a layer with that window needs; `length` counts all.
    """

    def __init__(self, capacity: int | None = None, *, window: int | None = None) -> None:
        self.capacity = None if capacity is None else checked_size("capacity", capacity)
        self.window = checked_window(window)
        if capacity is not None and window is not None:
            raise ValueError(f"give capacity or window, got {capacity} and {window}.")
        self.length = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def append(
        self, key: Float[Tensor, "B G N d"], value: Float[Tensor, "B G N d"]
    ) -> tuple[Float[Tensor, "B G S d"], Float[Tensor, "B G S d"]]:
        """Add N tokens; return the keys and values to attend over, these N the last of them.

        Raises TypeError or ValueError, and keeps what there is, if they are no keys and values, or
        do not fit the capacity or what is there already.
        """
        check_heads("key", key)
        check_heads("value", value)
        if (key.shape, key.device) != (value.shape, value.device):
            raise ValueError(
                "value must have the shape and the device of key, got"
                f" {tuple(value.shape)} on {value.device} and {tuple(key.shape)} on {key.device}."
            )
        tokens = key.shape[2]
        if self.capacity is not None and self.length + tokens > self.capacity:
            raise ValueError(
                f"cache is full: it holds {self.length} of {self.capacity} tokens and {tokens} more"
                " came; give KeyValueCache a larger capacity, or none."
            )
        held = key if self.key is None else self.key
        apart = [h != n for h, n in zip(held.shape, key.shape, strict=True)]
        if held.device != key.device or apart[0] or apart[1] or apart[3]:
            raise ValueError(
                f"cache holds keys of shape {tuple(held.shape)}, and {tuple(key.shape)} came as"
                f" key, on {held.device} and {key.device}; use one for each layer and batch."
            )
        if self.key is None or self.value is None:
            sizes = (*key.shape[:2], self.capacity or 0, key.shape[3])
            self.key, self.value = key.new_empty(sizes), value.new_empty(sizes)
        start, self.length = self.length, self.length + tokens
        if self.capacity is None:
            behind = start if self.window is None else self.window  # a token sees no more than W
            key = torch.cat((self.key[:, :, -behind:], key), dim=2)
            value = torch.cat((self.value[:, :, -behind:], value), dim=2)
            self.key, self.value = key, value
            if self.window is not None and key.shape[2] > self.window + 1:
                last = slice(-self.window - 1, None)
                self.key, self.value = key[:, :, last].clone(), value[:, :, last].clone()
            return key, value
        self.key[:, :, start : self.length] = key
        self.value[:, :, start : self.length] = value
        return self.key[:, :, : self.length], self.value[:, :, : self.length]

    def reset(self) -> None:
        """Forget every token."""
        self.length = 0
        self.key = self.value = None

    def __repr__(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return f"KeyValueCache(length={self.length}, capacity={self.capacity}{window})"
