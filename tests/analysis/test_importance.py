"""What a score loses without an expert."""

from __future__ import annotations

import pytest

import phatgoose as pg
from analysed import TASKS
from phatgoose.routing.compose import compose


def test_effects_are_differences_of_scores(found, llama, llama_pool):
    assert {effect.expert for effect in found.effects} == set(llama_pool.names)
    means = [effect.mean for effect in found.effects]
    assert means == sorted(means, reverse=True)
    effect = found.effects[0]
    less = compose(llama_pool, llama, leave_out=[effect.expert])
    reduced = pg.evaluate(less, TASKS)
    for score in reduced.scores:
        everyone = found.routers["phatgoose"].scores[score.task].score
        assert effect.by_task[score.task] == pytest.approx(everyone - score.score)
    assert effect.interval.low <= effect.mean <= effect.interval.high
