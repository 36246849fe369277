"""research/study/margins.py: what is unsure is answered by the other router."""

from __future__ import annotations

import runpy

import numpy as np
import pytest

from paths import ROOT
from phatgoose.evaluation.comparison.result_store import ResultStore

POOL = ["aaaaaaaa", "bbbbbbbb"]


@pytest.fixture
def margins():
    return runpy.run_path(str(ROOT / "research" / "study" / "margins.py"))


@pytest.fixture
def results(tmp_path):
    """One dataset, answered by two routers with two experts, and by others that don't count."""
    store = ResultStore(tmp_path / "results.jsonl")
    for router, settings, pool, right in (
        ("discriminant", {"input_k": None}, POOL, [1, 1, 0, 0]),
        ("discriminant", {"input_k": None}, POOL[:1], [0, 0, 0, 0]),
        ("discriminant", {"input_k": 3}, POOL, [0, 0, 0, 0]),
        ("joint-discriminant", {"input_k": 1}, POOL, [1, 0, 0, 0]),
        ("joint-discriminant", {"input_k": None}, POOL, [0, 0, 0, 0]),  # three
        ("phatgoose", {}, POOL, [0, 0, 1, 1]),
    ):
        key = {"base": "b", "method": {"router": router, **settings, "pool": pool}, "task": "t"}
        marks = [[[float(each)]] for each in right]
        store.add(key, {"metrics": ["accuracy"], "marks": marks})
    return str(store.path)


def test_whoever_is_sure_answers(margins, results, capsys):
    own, other = (margins["cells"]([results], name, 2) for name in ("discriminant", "phatgoose"))
    margins["tell"]({"t": np.array([0.4, 0.25, 0.12, 0.01])}, own, other)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("| 0", "100%", "50.0"),  # own answers, two of them right
        ("| 0.05", "75%", "75.0"),
        ("| 0.1", "75%", "75.0"),
        ("| 0.15", "50%", "100.0"),
        ("| 0.2", "50%", "100.0"),
        ("| 0.3", "25%", "75.0"),
    ]
    assert rows[3][3].startswith("+50.0 [")


def test_rows_of_several_experts_an_input_do_not_count(margins, results):
    found = margins["cells"]([results], "joint-discriminant", 2)
    assert found == {"t": (["accuracy"], [[[1.0]], [[0.0]], [[0.0]], [[0.0]]])}
