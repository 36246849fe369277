"""The analysis as a whole: routers over a pool, Oracle, agreement, effects, findings, traces."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest

import phatgoose as pg
from analysed import TASKS, task
from phatgoose.analysis.measures import ORACLE, kl_divergence
from phatgoose.config import Routing
from phatgoose.errors import ConfigError, EvaluationError, PoolError, RoutingError, TaskError
from phatgoose.routing.compose import compose
from phatgoose.routing.saved.save import save
from routed_models import SCORES

SINGLE = Routing(router="single:expert=e0")


def test_each_router_is_read_and_scored_as_if_it_were_alone(found, llama, llama_pool):
    for router in ("phatgoose", "arrow"):
        model = compose(llama_pool, llama, router=router)
        alone = pg.analyse(model, TASKS)
        assert list(alone.routers) == [router]
        for name, profile in alone.routers[router].distributions.items():
            np.testing.assert_array_equal(
                profile.whole(), found.routers[router].distributions[name].whole()
            )
        scores = pg.evaluate(model, TASKS).scores
        assert tuple(found.routers[router].scores.values()) == scores
        pg.detach(model)


def test_the_base_is_left_as_it_was(llama, llama_pool):
    pg.analyse(llama_pool, TASKS, base=llama, score=False)
    compose(llama_pool, llama)  # refused if it were still routed


def test_oracle_and_divergences(found):
    assert found.oracle == {"first": "e1", "second": "e2"}
    for dataset, expert in found.oracle.items():
        one = np.eye(4)[int(expert[1])]
        np.testing.assert_allclose(found.distribution(ORACLE, dataset), one, atol=1e-6)
        p = found.routers["phatgoose"].distributions[dataset].whole("probability")
        divergence = found.divergence("phatgoose", ORACLE, dataset)
        assert divergence.to == pytest.approx(kl_divergence(p, one))
        assert divergence.back == pytest.approx(kl_divergence(one, p))
    assert found.correlation("phatgoose").n == 2
    assert found.correlation("phatgoose").pearson is None


def test_oracle_needs_not_be_run_to_be_compared_with(llama, llama_pool):
    found = pg.analyse(llama_pool, TASKS, base=llama, scores=SCORES, score=False)
    np.testing.assert_array_equal(found.distribution(ORACLE, "first"), np.eye(4)[1])
    assert found.correlation("phatgoose") is None
    plain = pg.analyse(llama_pool, TASKS, base=llama, score=False)
    assert not plain.oracle
    assert plain.correlation("phatgoose") is None


def test_a_pool_by_its_path_and_a_routed_folder(llama, llama_pool, tmp_path):
    model = compose(llama_pool, llama, k=1)
    save(model, tmp_path / "routed")
    pg.detach(model)
    folder = llama_pool.experts[0].directory.parent
    from_pool = pg.analyse(folder, TASKS, routing=Routing(k=1), score=False)
    from_routed = pg.analyse(tmp_path / "routed", TASKS, score=False)
    assert from_pool.settings["routing"] == from_routed.settings["routing"]
    for name in ("first", "second"):
        one, other = (a.routers["phatgoose"].distributions[name] for a in (from_pool, from_routed))
        np.testing.assert_allclose(one.whole(), other.whole(), atol=5e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": []}, TaskError, "No task"),
        ({"tasks": [TASKS[0], TASKS[0]]}, TaskError, "Two tasks are called 'first'"),
        ({"smoothing": 0}, EvaluationError, "smoothing"),
        ({"without_each": True, "score": False}, ConfigError, "needs a pool of several"),
        ({"without_each": True, "routing": SINGLE}, ConfigError, "without its expert"),
        ({"tasks": [task("third")], "scores": SCORES}, ConfigError, "don't have task 'third'"),
        ({"routers": ["nothing"]}, ConfigError, "router is 'nothing'"),
    ],
)
def test_what_cannot_be_analysed_is_refused(llama, llama_pool, options, error, message):
    options = {"tasks": TASKS, "base": llama} | options
    with pytest.raises(error, match=message):
        pg.analyse(llama_pool, options.pop("tasks"), **options)


@pytest.mark.parametrize(
    ("router", "error", "message"),
    [
        ("retrieval", PoolError, "no embeddings"),
        ("best-individual", ConfigError, "needs the scores"),
        ("oracle", ConfigError, "needs the scores"),
        ("single", PoolError, "needs the name of its expert"),
        ("nothing", ConfigError, "router is 'nothing'"),
    ],
)
def test_a_router_that_cannot_be_is_refused_before_others_read(
    llama, llama_pool, monkeypatch, router, error, message
):
    monkeypatch.setattr(
        "phatgoose.analysis.analyse.read_examples", lambda *_: pytest.fail("read something")
    )
    with pytest.raises(error, match=message):
        pg.analyse(llama_pool, TASKS, routers=["phatgoose", router], base=llama)


def test_what_only_a_pool_can_do(llama, llama_pool):
    model = compose(llama_pool, llama)
    with pytest.raises(ConfigError, match="Several routers need a pool"):
        pg.analyse(model, TASKS, routers=["arrow"])
    with pytest.raises(ConfigError, match="needs a pool"):
        pg.analyse(model, TASKS, without_each=True)
    with pytest.raises(RoutingError, match="not routed"):
        pg.analyse(pg.detach(model), TASKS)


def test_an_oracle_without_scores_of_a_task_leaves_the_base_unrouted(llama, llama_pool):
    with suppress(RoutingError, ConfigError):
        pg.analyse(llama_pool, [task("third")], routers=["oracle"], base=llama, scores=SCORES)
    compose(llama_pool, llama)
