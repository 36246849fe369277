"""Batches: within their budget, padded on the right side."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phatgoose.errors import BaseModelError
from phatgoose.tasks.batching import (
    Collator,
    batches_of_tokens,
    decoder_start,
    pad_left,
    pad_right,
    position_ids,
)
from phatgoose.tasks.encoding import TokenPair
from tiny import copied_model


@settings(max_examples=100)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 120))
def test_batches_visit_each_row_once_within_the_budget(lengths, budget):
    batches = list(batches_of_tokens(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= budget or len(batch) == 1


def test_batches_hold_rows_of_similar_length_longest_first():
    assert list(batches_of_tokens([1, 9, 2, 10], 20)) == [[3, 1], [2, 0]]


def test_rows_are_padded_on_the_side_that_was_asked_for():
    assert pad_left([[5], [6, 7]], 0).tolist() == [[0, 5], [6, 7]]
    assert pad_right([[5], [6, 7]], 0).tolist() == [[5, 0], [6, 7]]


def test_a_target_begins_with_the_token_that_the_base_names():
    model = copied_model("t5")
    model.config.decoder_start_token_id = 7
    batch = Collator(model, 0)([TokenPair([5], [8, 9, 1])])
    assert decoder_start(model) == 7
    assert batch["decoder_input_ids"].tolist() == [[7, 8, 9]]


def test_a_base_that_names_no_token_to_begin_with_is_refused():
    model = copied_model("t5")
    model.config.decoder_start_token_id = None
    with pytest.raises(BaseModelError, match="has no decoder_start_token_id"):
        Collator(model, 0)
    assert Collator(copied_model("llama"), 0)([TokenPair([5], [8, 1])])  # needs none


def test_positions_count_real_tokens_only():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    positions = position_ids(mask)
    assert positions[0, 2:].tolist() == [0, 1]
    assert positions[1, :3].tolist() == [0, 1, 2]
    assert positions[2].tolist() == [0, 1, 2, 3]
    assert (positions >= 0).all()
