"""Caches of several rows: joined, and freed of columns that nobody needs."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from phatgoose.apps.server.engine import drop_columns, join


def cache(rows: int, tokens: int, value: float) -> DynamicCache:
    """One layer of two heads whose states are all `value`."""
    states = torch.full((rows, 2, tokens, 4), value)
    made = DynamicCache()
    made.update(states, states + 10, 0)
    return made


def test_rows_are_padded_on_the_left_to_the_longer_ones_columns():
    one = cache(1, 2, 1.0)
    join(one, cache(2, 3, 2.0))
    keys, values = one.layers[0].keys, one.layers[0].values
    assert keys.shape == values.shape == (3, 2, 3, 4)
    assert keys[:, 0, :, 0].tolist() == [[0, 1, 1], [2, 2, 2], [2, 2, 2]]
    assert values[:, 0, :, 0].tolist() == [[0, 11, 11], [12, 12, 12], [12, 12, 12]]


def test_the_first_columns_are_dropped():
    one = cache(1, 2, 1.0)
    join(one, cache(1, 3, 2.0))
    drop_columns(one, 1)
    assert one.get_seq_length() == 2
    assert one.layers[0].keys[:, 1, :, 3].tolist() == [[1, 1], [2, 2]]
