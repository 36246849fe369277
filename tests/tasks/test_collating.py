"""Batches: within their budget, padded on the right side."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phatgoose.errors import BaseModelError
from phatgoose.tasks.batching import (
    Collator,
    batches_of_tokens,
    decoder_start,
    pad_left,
    pad_right,
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
