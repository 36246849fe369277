"""Scores of single experts: read from a comparison, and who is best by them."""

from __future__ import annotations

import json

import pytest

from odd_files import nested, one_line_of
from phatgoose.errors import PoolError
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers.router import best_expert, best_expert_by_task, read_scores
from routed_models import SCORES

NAMES = ("e0", "e1", "e2", "e3")


@pytest.fixture
def comparison(tmp_path):
    """A comparison's JSON file with more in it than the experts' scores."""
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"models": {"merged": 0.4}, "experts": SCORES, "tasks": []}))
    return path


def test_the_scores_of_a_comparison_are_read(comparison):
    assert read_scores(comparison) == SCORES
    assert read_scores(str(comparison)) == SCORES


def test_whole_numbers_become_fractions(tmp_path):
    (tmp_path / "c.json").write_text('{"experts": {"e0": {"t": 1}}}')
    (score,) = read_scores(tmp_path / "c.json")["e0"].values()
    assert isinstance(score, float)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(PoolError, match=r"nowhere\.json can't be read: No such file"):
        read_scores(tmp_path / "nowhere.json")
    with pytest.raises(PoolError, match=r"holds no scores of single experts; wanted the"):
        read_scores(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"models": {}}',
        '{"experts": null}',
        '{"experts": []}',
        '{"experts": {}}',
        '{"experts": {"e0": 0.5}}',
        '{"experts": {"e0": [0.5]}}',
        '{"experts": {"e0": {"t": null}}}',
        '{"experts": {"e0": {"t": "good"}}}',
        '{"experts": {"e0": {"t": [0.5]}}}',
        '{"experts": {"e0": {"t": NaN}}}',
        '{"experts": {"e0": {}}}',
    ],
)
def test_a_file_without_scores_is_told(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(PoolError, match=r"c\.json holds no scores of single experts; wanted the"):
        read_scores(tmp_path / "c.json")


def test_a_file_that_is_no_text_is_told(tmp_path):
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PoolError, match="holds no scores"):
        read_scores(tmp_path / "c.json")


def test_the_best_expert_has_the_best_mean():
    assert best_expert(SCORES, NAMES) == "e3"
    assert best_expert(SCORES, ("e0", "e1", "e2")) == "e1"  # 0.45 each; the first of equals
    assert best_expert(SCORES, ("e2", "e1", "e0")) == "e2"
    assert best_expert(SCORES, ("e0",)) == "e0"


def test_the_best_expert_of_each_task():
    assert best_expert_by_task(SCORES, NAMES) == {"first": "e1", "second": "e2"}
    assert best_expert_by_task(SCORES, ("e0", "e3")) == {"first": "e3", "second": "e3"}
    even = {"e0": {"t": 0.5}, "e1": {"t": 0.5}}
    assert best_expert_by_task(even, ("e1", "e0")) == {"t": "e1"}


def test_the_order_in_which_tasks_stand_does_not_matter():
    turned = {**SCORES, "e1": dict(reversed(SCORES["e1"].items()))}
    assert best_expert_by_task(turned, NAMES) == best_expert_by_task(SCORES, NAMES)


@pytest.mark.parametrize("best", [best_expert, best_expert_by_task])
def test_every_expert_must_be_scored_on_the_same_tasks(best):
    with pytest.raises(PoolError, match="'e9' has no scores; they are of e0, e1, e2, e3"):
        best(SCORES, ("e0", "e9"))
    for odd in ({"first": 0.1}, {**SCORES["e0"], "third": 0.2}, {}):
        with pytest.raises(PoolError, match="'e0' and 'e2' were scored on different tasks"):
            best({**SCORES, "e2": odd}, NAMES)
    best({**SCORES, "e9": {"other": 1.0}}, NAMES)  # nobody asked for e9


@pytest.mark.parametrize("as_text", [True, False])
def test_compose_takes_the_scores_and_their_file_alike(llama, llama_pool, comparison, as_text):
    path = str(comparison) if as_text else comparison
    model = compose(llama_pool, llama, router="oracle", scores=path)
    best = composition_of(model).prompt_router.tables.info["experts_by_task"]
    assert best == {"first": 1, "second": 2}


@pytest.mark.parametrize(
    "text", ["[]", nested(100_000), '{"experts": 5}', '{"experts": {"a": []}}']
)
def test_odd_scores_are_one_line(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    one_line_of(lambda: read_scores(tmp_path / "scores.json"), PoolError)
