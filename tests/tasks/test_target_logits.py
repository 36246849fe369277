"""Logits of targets: only those, and where they belong."""

from __future__ import annotations

import pytest
import torch

from phatgoose.tasks.batching import (
    IGNORED,
    Collator,
    contiguous_head,
    head_at,
    quick_backward,
    target_logits,
)
from tiny import assert_same_logits, logits_of, make_model, pairs_of
from training_runs import TASK


def test_targets_stand_where_they_are_predicted(base):
    pairs = pairs_of(base, TASK)
    batch = Collator(base.model, 0)(pairs)
    with torch.no_grad():
        logits = target_logits(base.model, batch)
    assert logits.shape[:2] == batch["labels"].shape
    for pair, row, labels in zip(pairs, logits, batch["labels"], strict=True):
        if base.is_encoder_decoder:
            target = torch.tensor([[0, *pair.target[:-1]]])
            wanted = logits_of(base.model, torch.tensor([pair.prompt]), decoder_input_ids=target)[0]
        else:
            ids = torch.tensor([pair.prompt + pair.target])
            wanted = logits_of(base.model, ids)[0, len(pair.prompt) - 1 : -1]
        assert labels[labels != IGNORED].tolist() == pair.target
        assert_same_logits(row[labels != IGNORED], wanted)


def test_the_head_sees_the_asked_for_places_only():
    model, ids = make_model("llama"), torch.tensor([[4, 5, 6], [7, 8, 9]])
    whole = model(ids).logits
    with head_at(model, torch.tensor([5, 0, 0])):
        some = model(ids).logits
    torch.testing.assert_close(some[0], whole.flatten(0, 1)[[5, 0, 0]], atol=1e-5, rtol=1e-5)
    assert model(ids).logits.shape == whole.shape


@pytest.mark.parametrize(("columns", "inside"), [(256, "eager"), (257, "sdpa")])
def test_attention_is_plain_in_short_rows_and_as_before_afterwards(columns, inside):
    model = make_model("llama")
    with quick_backward(model, columns):
        assert model.config._attn_implementation == inside
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("rows", [1, 3])
def test_the_last_position_reaches_the_head_as_rows_of_its_own(rows):
    """torch copies the whole output matrix for a view, even for a view of one row."""
    model, ids = make_model("llama"), torch.arange(3, 3 + 5 * rows).reshape(rows, 5)
    seen: list[tuple[int, ...]] = []
    head = model.get_output_embeddings()
    wanted = model(ids, logits_to_keep=1).logits
    head.register_forward_hook(lambda _, args, __: seen.append(args[0].stride()))
    model(ids, logits_to_keep=1)
    with contiguous_head(model):
        got = model(ids, logits_to_keep=1).logits
    model(ids, logits_to_keep=1)
    size = head.in_features
    assert seen == [(5 * size, size, 1), (size, size, 1), (5 * size, size, 1)]
    torch.testing.assert_close(got, wanted)
