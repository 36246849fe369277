"""Scores of single experts: read from a comparison, and who is best by them."""

from __future__ import annotations

import json
import math

import pytest

from odd_files import nested, one_line_of
from phatgoose.errors import PoolError
from phatgoose.routing.compose import compose
from phatgoose.routing.routers.scores import best_expert, best_expert_by_task, read_scores
from routed_models import SCORES

NAMES = ("e0", "e1", "e2", "e3")


@pytest.fixture
def comparison(tmp_path):
    """A comparison's JSON file with more in it than the experts' scores."""
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"models": {"merged": 0.4}, "experts": SCORES, "tasks": []}))
    return path


def test_the_scores_of_a_comparison_are_read(comparison, tmp_path):
    assert read_scores(comparison) == read_scores(str(comparison)) == SCORES
    (tmp_path / "c.json").write_text('{"experts": {"e0": {"t": 1}}}')
    (score,) = read_scores(tmp_path / "c.json")["e0"].values()
    assert isinstance(score, float)  # whole numbers become fractions


NO_SCORES = ["", "{", "[]", "3", "null", "{}", '{"models": {}}', b"\xff\xfe\x00", nested(100_000)]
NO_SCORES += [f'{{"experts": {odd}}}' for odd in ("null", "[]", "{}", "5")]
NO_SCORES += [f'{{"experts": {{"e0": {odd}}}}}' for odd in ("0.5", "[0.5]", "{}", "[]")]
NO_SCORES += [
    f'{{"experts": {{"e0": {{"t": {odd}}}}}}}' for odd in ("null", '"good"', "[0.5]", "NaN")
]


@pytest.mark.parametrize("content", NO_SCORES)
def test_a_file_without_scores_is_one_line(tmp_path, content):
    path = tmp_path / "c.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "c.json" in one_line_of(lambda: read_scores(path), PoolError)


@pytest.mark.parametrize("given", [{"e0": {"t": "good"}}, {"e0": {"t": math.nan}}, {"e0": {}}, 3])
def test_scores_that_are_none_are_told(llama, llama_pool, given):
    with pytest.raises(PoolError, match=r"wanted expert -> task -> score, finite numbers"):
        compose(llama_pool, llama, router="best-individual", scores=given)


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
