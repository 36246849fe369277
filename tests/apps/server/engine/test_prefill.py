"""Prompts read together."""

from __future__ import annotations

import numpy as np
import pytest

from batched import by_generate, finish, prompt_of, row_of
from phatgoose.apps.server import engine as prefill
from phatgoose.apps.server.engine import Batch
from phatgoose.apps.server.sequences import Decoding
from tiny import VOCABULARY


def test_a_prompt_that_several_answers_share_is_read_once(runner_of, monkeypatch):
    runner = runner_of()
    seen = []
    decode = runner.decode
    monkeypatch.setattr(
        runner,
        "decode",
        lambda ids, *a, **k: (seen.append(tuple(ids.shape)), decode(ids, *a, **k))[1],
    )
    batch = Batch(runner)
    rows = [row_of(runner, prompt_of(0, 6), choice=i) for i in range(3)] + [
        row_of(runner, prompt_of(1, 8))
    ]
    batch.join(rows)
    finish(batch)
    assert seen[0] == (2, 8)
    assert seen[1] == (4, 1)
    assert rows[0].generated == rows[2].generated == by_generate(runner, prompt_of(0, 6), 12)


def test_a_long_prompt_is_scored_in_several_passes(runner_of, monkeypatch):
    runner = runner_of()
    wish = Decoding(2, 0.0, logprobs=1, echo=True, routing=True)
    prompts = [prompt_of(1, 23), prompt_of(2, 11)]

    def told():
        batch, rows = Batch(runner), [row_of(runner, prompt, wish) for prompt in prompts]
        batch.join(rows)
        finish(batch)
        return [row.deliver for row in rows]

    at_once = told()
    monkeypatch.setattr(prefill, "MOST_LOGITS", 2 * 4 * VOCABULARY)  # four columns at a time
    for one, other in zip(at_once, told(), strict=True):
        assert [t.text for t in one.tokens] == [t.text for t in other.tokens]
        scores = [[t.logprob for t in each.tokens[1:]] for each in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
        experts = [np.concatenate([s.experts for s in each.routing]) for each in (one, other)]
        assert (experts[0] == experts[1]).mean() > 0.98
