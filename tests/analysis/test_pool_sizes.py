"""Curves over pool sizes, from the cells that comparisons left."""

import json

import pytest

import phatgoose as pg
from phatgoose.analysis.pool_sizes import pool_size_curves
from phatgoose.errors import EvaluationError
from phatgoose.evaluation.comparison.result_store import ResultStore
from phatgoose.tasks.task import Entry, Suite


def cell(store, pool, task, marks, *, router="phatgoose", examples="x", code="1", **settings):
    method = {"router": router, "kernel": "auto", "k": 2, "pool": list(pool)} | settings
    key = {"base": "b", "dtype": "d", "method": method, "task": task, "examples": examples}
    result = {"metrics": ["accuracy"], "marks": [[[mark]] for mark in marks]}
    store.add(key | {"code": code}, result)


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "results.jsonl")


def test_means_over_common_datasets_by_size(store):
    cell(store, "ab", "one", [1, 0])
    cell(store, "ab", "two", [1, 1])
    cell(store, "cd", "one", [0, 0])
    cell(store, "cd", "two", [1, 0])
    cell(store, "abcd", "one", [1, 1])
    cell(store, "abcd", "two", [1, 1])
    cell(store, "abcd", "three", [0, 0])  # only there: left out
    cell(store, "a", "one", [1, 1], router="single", k=1)
    (curve,) = pool_size_curves(store.path)
    assert curve.label == "PHATGOOSE"
    assert curve.datasets == ("one", "two")
    assert curve.scores == {2: (0.75, 0.25), 4: (1.0,)}


def test_routers_and_settings_are_kept_apart(store):
    for pool in ("a", "abc"):
        cell(store, pool, "one", [1, 0])
        cell(store, pool, "one", [1, 1], k=1)
        cell(store, pool, "one", [0, 0], router="arrow")
    curves = {curve.label: curve.scores for curve in pool_size_curves(store.path)}
    assert curves == {
        "PHATGOOSE": {1: (0.5,), 3: (0.5,)},
        "PHATGOOSE, k = 1": {1: (1.0,), 3: (1.0,)},
        "Arrow": {1: (0.0,), 3: (0.0,)},
    }


def test_other_examples_are_another_dataset(store):
    cell(store, "a", "one", [1, 0], examples="x")
    cell(store, "ab", "one", [1, 0], examples="y")
    with pytest.raises(EvaluationError, match="no router with pools of two sizes"):
        pool_size_curves(store.path)


def test_the_last_version_of_the_code_counts(store):
    cell(store, "a", "one", [0, 0], code="1")
    cell(store, "a", "one", [1, 1], code="2")
    cell(store, "ab", "one", [1, 0], code="2")
    (curve,) = pool_size_curves(store.path)
    assert curve.scores == {1: (1.0,), 2: (0.5,)}


KEY = {"base": "b", "dtype": "d", "task": "t", "examples": "x", "code": "c"}
METHOD = {"router": "phatgoose", "pool": ["a"]}
RESULT = {"metrics": ["accuracy"], "marks": [[[1.0]]]}


@pytest.mark.parametrize(
    ("key", "result"),
    [
        ({}, RESULT),
        ({"method": METHOD}, RESULT),
        (KEY | {"method": 3}, RESULT),
        (KEY | {"method": METHOD | {"pool": 3}}, RESULT),
        (KEY | {"method": METHOD}, {}),
        (KEY | {"method": METHOD}, {"metrics": [], "marks": [[[1.0]]]}),
        (KEY | {"method": METHOD}, {"metrics": ["accuracy"], "marks": []}),
        (KEY | {"method": METHOD}, {"metrics": ["accuracy"], "marks": [[["?"]]]}),
        (KEY | {"method": METHOD}, {"metrics": ["accuracy"], "marks": [[[float("nan")]]]}),
        (KEY | {"method": METHOD}, {"metrics": ["nothing"], "marks": [[[1.0]]]}),
    ],
)
def test_results_of_others_are_refused_by_name(tmp_path, key, result):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"key": key, "result": result}) + "\n")
    with pytest.raises(EvaluationError, match=r"results.jsonl is no results.jsonl of compare: "):
        pool_size_curves(path)


def test_unknown_routers_come_last(store):
    for router in ("gone", "phatgoose"):
        for pool in ("a", "ab"):
            cell(store, pool, "one", [1, 0], router=router)
    assert [curve.label for curve in pool_size_curves(store.path)] == ["PHATGOOSE", "gone"]


def test_cells_of_real_comparisons(llama, llama_pool, tmp_path):
    rows = [
        {"input": f"Film {i} is", "target": "good", "choices": ["good", "bad"]} for i in range(4)
    ]
    suite = Suite("s", (Entry("films", lambda _: pg.load_task(rows, name="films")),))
    for keep in (["e0", "e1"], None):
        pool = llama_pool.select(keep)
        methods = ["phatgoose", "merged"]
        found = pg.compare(pool, [suite], methods, out=tmp_path, base=llama)
    curves = {curve.label: curve for curve in pool_size_curves(tmp_path / "results.jsonl")}
    assert curves.keys() == {"PHATGOOSE", "Merged Experts"}
    assert list(curves["PHATGOOSE"].scores) == [2, 4]
    assert curves["PHATGOOSE"].scores[4] == (found.results["phatgoose"]["films"].score,)
