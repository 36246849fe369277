"""The analysis as a whole: routers over a pool, Oracle, agreement, effects, findings, JSON."""

import json
from dataclasses import replace

import numpy as np
import pytest

import phatgoose as pg
from analysed import TASKS, task
from phatgoose.analysis.analyse import findings_of
from phatgoose.analysis.distribution import RoutingDistribution
from phatgoose.analysis.measures import ORACLE, kl_divergence
from phatgoose.analysis.report import report_page
from phatgoose.errors import ConfigError, PoolError, TaskError
from phatgoose.routing.compose import compose
from routed_models import SCORES
from topic_prompts import OPEN, PROMPTS, experts_of


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
        (
            {"tasks": [TASKS[0], replace(TASKS[1], name="first")]},
            TaskError,
            "Two tasks are called 'first'",
        ),
        ({"tasks": [task("third")], "scores": SCORES}, ConfigError, "don't have task 'third'"),
    ],
)
def test_what_cannot_be_analysed_is_refused(llama, llama_pool, options, error, message):
    options = {"tasks": TASKS, "base": llama} | options
    with pytest.raises(error, match=message):
        pg.analyse(llama_pool, options.pop("tasks"), **options)


@pytest.mark.parametrize(
    ("router", "error", "message"),
    [
        ("best-individual", ConfigError, "needs the scores"),
        ("single", PoolError, "needs the name of its expert"),
    ],
)
def test_a_router_that_cannot_be_is_refused_before_others_read(
    llama, llama_pool, monkeypatch, router, error, message
):
    monkeypatch.setattr(llama.model, "forward", lambda *_, **__: pytest.fail("read something"))
    with pytest.raises(error, match=message):
        pg.analyse(llama_pool, TASKS, routers=["phatgoose", router], base=llama)


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
    found = pg.analyse(
        llama_pool, OPEN, routers=["discriminant", "phatgoose"], base=llama, score=False
    )
    kept = found.routers["discriminant"].choices["open"]
    model = compose(llama_pool, llama, router="discriminant")
    named = experts_of(model, PROMPTS).named(llama_pool.names)
    wanted = [[row.get(name, 0) for name in llama_pool.names] for row in named]
    np.testing.assert_allclose(sorted(kept.tolist()), sorted(wanted), atol=1e-6)
    assert not found.routers["phatgoose"].choices
    assert found.to_dict()["routers"]["discriminant"]["choices"]["open"] == kept.tolist()
    both = report_page(found)
    assert "Which prompts went where" in both
    assert "Discriminant on open: mean weight" not in both  # all layers are alike
    assert "PHATGOOSE on open: mean weight" in both
    alone = replace(found, routers={"discriminant": found.routers["discriminant"]})
    assert "Experts by layer" not in report_page(alone)


# What looks wrong


def profile_with(first, probability=None, tokens=1000):
    """A profile of one site with these shares of first choices and of probability."""
    names = tuple(f"e{z}" for z in range(len(first)))
    probability = first if probability is None else probability
    rows = {
        measure: {"model.layers.0.q": np.array([tokens * np.array(share, float), [0] * len(first)])}
        for measure, share in (
            ("probability", probability),
            ("weight", first),
            ("chosen", first),
            ("first", first),
        )
    }
    present = np.array(probability)[np.array(probability) > 0]
    entropy = -(present * np.log(present)).sum()
    site = {"model.layers.0.q": np.array([tokens, 0.0])}
    return RoutingDistribution(
        names, site, rows, {"model.layers.0.q": np.array([tokens * entropy, 0.0])}
    )


ONE = profile_with([0.6, 0.4, 0.0], [0.5, 0.4, 0.1])
OTHER = profile_with([0.0, 0.4, 0.6], [0.1, 0.4, 0.5])


@pytest.mark.parametrize(
    ("profiles", "kinds"),
    [
        ([profile_with([0.5, 0.3, 0.2])], []),
        ([profile_with([0.85, 0.1, 0.05])], [("takes-everything", ("e0",))]),
        ([profile_with([0.75, 0.2, 0.05])], []),
        ([ONE], [("never-wins", ("e2",))]),
        ([ONE, OTHER], []),  # it wins on one of several datasets
    ],
)
def test_what_looks_wrong_is_found_once_and_nothing_else(profiles, kinds):
    findings = findings_of({f"d{i}": each for i, each in enumerate(profiles)})
    assert [(finding.kind, finding.experts) for finding in findings] == kinds
