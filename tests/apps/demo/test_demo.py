"""The demo on a tiny base with few steps, and the rows of its tasks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace

import pytest

from phatgoose.apps.demo import demo
from phatgoose.evaluation.comparison.methods import METHODS
from phatgoose.routing.composition import composition_of
from phatgoose.routing.saved.load import load
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.task import Example

EXPERTS = ("sentiment", "entailment", "arithmetic", "ordering", "category")
UNSEEN = ("hotel_feedback", "true_or_false", "word_problems", "which_first", "odd_one_out")
DIGEST = "275d3c70fd69e4dd6ba9ce612187ed1ff458f3994609af25c30cf08fcb1373b2"


def rows_of(names: tuple[str, ...], split: str) -> dict[str, tuple[Example, ...]]:
    return {name: getattr(load_task(demo.TASKS / f"{name}.csv"), split) for name in names}


@pytest.fixture
def small(monkeypatch) -> None:
    """A demo of a few steps and examples, without a sentence embedder."""
    few = {"steps": 1, "eval_every": 1, "batch_size": 2, "eval_examples": 2}
    monkeypatch.setattr(demo, "TRAINING", replace(demo.TRAINING, **few))
    gates = replace(demo.GATES, gate_steps=1, statistics_examples=2)
    monkeypatch.setattr(demo, "GATES", gates)
    monkeypatch.setattr(demo, "LORA", replace(demo.LORA, rank=2))
    monkeypatch.setattr(demo, "EVALUATED", 3)
    monkeypatch.setattr(demo, "THREADS", 1)
    monkeypatch.setattr(demo, "can_embed", lambda: False)


@pytest.mark.usefixtures("small")
def test_the_demo_leaves_experts_tables_a_figure_and_a_model_and_can_be_repeated(
    base_folders, phat, tmp_path, monkeypatch
):
    out = tmp_path / "demo"
    shown = phat("demo", "--base", base_folders["llama"], "--out", out)
    assert shown.code == 0
    for part in (*EXPERTS, "Base model", "PHATGOOSE", "Oracle *", "Done in"):
        assert part in shown.out
    comparison = json.loads((out / "comparison.json").read_text())
    assert set(METHODS) - set(comparison["rows"]) == {"retrieval", "centroid", "glider"}
    assert comparison["suites"] == {"unseen": list(UNSEEN)}
    assert {row["n"] for row in comparison["rows"]["phatgoose"]["datasets"].values()} == {3}
    assert sorted(comparison["experts"]) == sorted(EXPERTS)
    assert "<html" in (out / "analysis" / "report.html").read_text(encoding="utf-8")
    assert composition_of(load(out / "routed")).experts == EXPERTS
    monkeypatch.setattr("phatgoose.evaluation.comparison.cells.score", None)  # all is there already
    again = phat("demo", "--base", base_folders["llama"], "--out", out)
    assert again.code == 0


def test_its_rows_are_distinct_and_no_unseen_task_has_a_row_that_is_trained_on():
    trained, unseen = rows_of(EXPERTS, "train"), rows_of(UNSEEN, "test")
    for tasks, count in ((trained, 400), (unseen, 100)):
        for rows in tasks.values():
            assert len({row.input for row in rows}) == len(rows) == count
    seen = {row.input for rows in trained.values() for row in rows}
    assert not seen & {row.input for rows in unseen.values() for row in rows}


def test_the_right_answer_of_its_rows_stands_at_each_place_equally_often():
    for rows in (rows_of(EXPERTS, "train") | rows_of(UNSEEN, "test")).values():
        places = Counter(row.choices.index(row.target) for row in rows)
        assert set(places) == set(range(len(rows[0].choices)))
        assert len(set(places.values())) == 1
        assert len({row.target for row in rows}) > 1


def test_its_files_hold_the_rows_that_the_results_in_the_readme_were_measured_on():
    digests = "".join(load_task(demo.TASKS / f"{name}.csv").digest for name in (*EXPERTS, *UNSEEN))
    assert hashlib.sha256(digests.encode()).hexdigest() == DIGEST
