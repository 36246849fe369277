"""Keys and values of many sequences in one cache, padded on the left.

transformers' caches can drop rows; joining two caches and dropping columns is done here.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Cache", "drop_columns", "join"]

Cache: TypeAlias = Any  # DynamicCache or EncoderDecoderCache; transformers has no types for mypy


def join(one: Cache, other: Cache) -> None:
    """Add the rows of `other` to `one`, both padded on the left to the longer one's columns."""
    columns = max(one.get_seq_length(), other.get_seq_length())
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        mine.keys = torch.cat([_padded(mine.keys, columns), _padded(theirs.keys, columns)])
        mine.values = torch.cat([_padded(mine.values, columns), _padded(theirs.values, columns)])


def _padded(states: Tensor, columns: int) -> Tensor:
    """`states` [rows, heads, tokens, n] with zeros before them: [rows, heads, columns, n]."""
    return torch.nn.functional.pad(states, (0, 0, columns - states.shape[-2], 0))


def drop_columns(cache: Cache, columns: int) -> None:
    """Drop the first `columns` of every row."""
    for layer in cache.layers:
        layer.keys = layer.keys[..., columns:, :].contiguous()
        layer.values = layer.values[..., columns:, :].contiguous()
