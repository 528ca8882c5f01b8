"""Modules: the mixing tensors, a whole layer, and its cache."""

from iha.modules.cache import KeyValueCache
from iha.modules.head_mixing import HeadMixing
from iha.modules.layer import InterleavedHeadAttention

__all__ = ["HeadMixing", "InterleavedHeadAttention", "KeyValueCache"]
