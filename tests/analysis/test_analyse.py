"""The analysis as a whole: routers over a pool, Oracle, agreement, effects, findings, JSON."""

import copy
import json
import re

import numpy as np
import pytest

import phatgoose as pg
from analysed import TASKS, task
from phatgoose.analysis.analyse import Analysis, findings_of
from phatgoose.analysis.distribution import MEASURES, RoutingDistribution
from phatgoose.analysis.measures import ORACLE, kl_divergence
from phatgoose.analysis.report import report_page
from phatgoose.errors import ConfigError, PoolError, TaskError
from phatgoose.routing.compose import compose
from routed_models import SCORES
from topic_prompts import OPEN, PROMPTS, experts_of


@pytest.fixture(scope="module")
def found(loaded_bases, pool_of) -> Analysis:
    """Two tasks, analysed under three routers."""
    base, routers = copy.deepcopy(loaded_bases["llama"]), ["phatgoose", "arrow", "oracle"]
    return pg.analyse(pool_of("llama"), TASKS, routers=routers, base=base, scores=SCORES)


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [  # beside those that the command line's tests have
        ({"tasks": []}, TaskError, "No task is given"),
        ({"tasks": [*TASKS, task("first")]}, TaskError, "Two tasks are called 'first'"),
        ({"tasks": [task("third")], "scores": SCORES}, ConfigError, "don't have task 'third'"),
        ({"routers": ["arrow", "best-individual"]}, ConfigError, "needs the scores"),
        ({"routers": ["arrow", "single"]}, PoolError, "needs the name of its expert"),
    ],
)
def test_what_cannot_be_analysed_is_refused_before_anything_is_read(
    llama, llama_pool, monkeypatch, options, error, message
):
    monkeypatch.setattr(llama.model, "forward", lambda *_, **__: pytest.fail("read something"))
    with pytest.raises(error, match=message):
        pg.analyse(llama_pool, **{"tasks": TASKS, "base": llama, **options})


def test_the_json_holds_the_numbers_and_no_text_of_the_data(found):
    content = json.dumps(found.to_dict())
    data = json.loads(content)
    assert data["experts"] == ["e0", "e1", "e2", "e3"]
    assert len(data["divergences"]) == 3 * 2 * 2  # each router to each other one, on two datasets
    profile = found.routers["arrow"].distributions["first"]
    assert data["routers"]["arrow"]["datasets"]["first"]["weight"] == profile.whole().tolist()
    assert "first 0 is" not in content
    assert "NaN" not in content


def test_what_was_chosen_for_each_prompt_is_kept_and_drawn(llama, llama_pool):
    routers = ["discriminant:fallback=off", "phatgoose"]
    found = pg.analyse(llama_pool, OPEN, routers=routers, base=llama, score=False)
    kept = found.routers["discriminant:fallback=off"].choices["open"]
    model = compose(llama_pool, llama, router="discriminant:fallback=off")
    named = experts_of(model, PROMPTS).named(llama_pool.names)
    wanted = [[row.get(name, 0) for name in llama_pool.names] for row in named]
    np.testing.assert_allclose(sorted(kept.tolist()), sorted(wanted), atol=1e-6)
    assert not found.routers["phatgoose"].choices
    choices = found.to_dict()["routers"]["discriminant:fallback=off"]["choices"]
    assert choices["open"] == kept.tolist()
    both = report_page(found)
    assert "Which prompts went where" in both
    assert "Discriminant on open: mean weight" not in both  # all layers are alike
    assert "PHATGOOSE on open: mean weight" in both


def test_what_is_left_to_the_base_agrees_with_no_expert(llama, llama_pool):
    settings = {"routers": ["discriminant"], "base": llama, "scores": SCORES, "score": False}
    found = pg.analyse(llama_pool, TASKS, **settings)
    assert not found.routers["discriminant"].distributions["first"].whole().any()
    assert found.divergence("discriminant", ORACLE, "first").to > 1
    assert json.dumps(found.to_dict(), allow_nan=False)
    assert not re.search(r"\bnan\b", report_page(found), re.IGNORECASE)


def profile_of(*first):
    """A profile of one site with these shares of first choices."""
    shares, tokens = np.array([first, [0.0] * len(first)]), {"model.layers.0.q": np.array([1, 0])}
    sums = {measure: {"model.layers.0.q": shares} for measure in MEASURES}
    return RoutingDistribution(tuple(f"e{z}" for z in range(len(first))), tokens, sums, tokens)


ONE, OTHER = profile_of(0.6, 0.4, 0.0), profile_of(0.0, 0.4, 0.6)


@pytest.mark.parametrize(
    ("profiles", "kinds"),
    [
        ([profile_of(0.85, 0.1, 0.05)], [("takes-everything", ("e0",))]),
        ([profile_of(0.75, 0.2, 0.05)], []),
        ([ONE], [("never-wins", ("e2",))]),
        ([ONE, OTHER], []),  # it wins on one of several datasets
    ],
)
def test_what_looks_wrong_is_found_once_and_nothing_else(profiles, kinds):
    findings = findings_of({f"d{i}": each for i, each in enumerate(profiles)})
    assert [(finding.kind, finding.experts) for finding in findings] == kinds
