"""Router oracle: the best expert of each task, told by its name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from phatgoose.errors import ConfigError, PoolError, RoutingError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from routed_models import SCORES
from tiny import logits_of, make_ids
from topic_prompts import CHOOSING, OPEN, both_streams, by_single


@both_streams
def test_the_oracle_scores_each_task_as_its_best_expert(base, pool):
    tasks = [
        replace(CHOOSING, name="first"),
        replace(CHOOSING, name="second"),
        replace(OPEN, name="first"),
    ]
    options = {"max_new_tokens": 5}
    got = evaluate(compose(pool, base, router="oracle", scores=SCORES), tasks, **options)
    detach(base.model)
    wanted = by_single(
        base, pool, ("e1", "e2", "e1"), lambda m, i: evaluate(m, tasks[i], **options).scores[0]
    )
    for one, other in zip(got.scores, wanted, strict=True):
        assert (one.task, one.metric, one.score) == (other.task, other.metric, other.score)
        for prediction, expected in zip(one.predictions, other.predictions, strict=True):
            assert prediction.answer == expected.answer
            assert prediction.scores == pytest.approx(expected.scores, abs=1e-4)
    assert got.scores[0].predictions != got.scores[1].predictions


def test_the_oracle_answers_no_other_task(llama, llama_pool):
    model = compose(llama_pool, llama, router="oracle", scores=SCORES)
    with pytest.raises(RoutingError, match="no scores for task 'open'; it has them for first, sec"):
        evaluate(model, OPEN)


@both_streams
def test_the_oracle_answers_nothing_that_belongs_to_no_task(base, pool, tmp_path):
    model = compose(pool, base, router="oracle", scores=SCORES)
    for _ in range(2):
        with pytest.raises(RoutingError, match="goes by the task's name"):
            logits_of(model, make_ids())
        evaluate(model, replace(CHOOSING, name="second"))
    with pytest.raises(RoutingError, match="goes by the task's name"):
        composition_of(model).context.choose([[1]])


@pytest.mark.parametrize("router", ["oracle", "best-individual"])
def test_scores_are_needed(llama, llama_pool, router):
    with pytest.raises(ConfigError, match=f"{router} needs the scores"):
        compose(llama_pool, llama, router=router)
    some = {name: SCORES[name] for name in ("e0", "e1", "e2")}
    with pytest.raises(PoolError, match="'e3' has no scores; they are of e0, e1"):
        compose(llama_pool, llama, router=router, scores=some)
    assert not hasattr(llama.model, "phatgoose")
