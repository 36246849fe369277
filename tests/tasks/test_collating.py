"""Batches of pairs: where targets stand, and what is padding."""

from __future__ import annotations

import torch

from phatgoose.tasks.collating import Collator, target_logits
from phatgoose.tasks.encoding import IGNORED
from tiny import assert_same_logits, logits_of, pairs_of
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
