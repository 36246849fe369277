"""Routing watched as it passes."""

from __future__ import annotations

from contextlib import suppress

import torch

from phatgoose.routing.compose import compose
from phatgoose.routing.recording import record
from tiny import logits_of, make_ids


def test_recording_changes_no_bit(base, pool):
    model, ids = compose(pool, base), make_ids()
    wanted = logits_of(model, ids)
    with record(model):
        assert torch.equal(logits_of(model, ids), wanted)


def test_recording_ends_with_its_context_even_after_an_error(llama, llama_pool):
    model = compose(llama_pool, llama)
    with suppress(LookupError), record(model) as recording:
        logits_of(model, make_ids())
        raise LookupError
    logits_of(model, make_ids())
    assert all(len(passes) == 1 for passes in recording.weights.values())
