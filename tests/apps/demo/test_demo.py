"""The demo on a tiny base with few steps, its tasks, and what it says of a comparison."""

import hashlib
import json
import shlex
from dataclasses import replace
from itertools import chain

import pytest

from made_comparison import made_comparison
from phatgoose.apps import demo
from phatgoose.apps.demo import SKILLS, TASKS, verdict
from phatgoose.evaluation.compare import METHODS
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import composition_of, load
from phatgoose.tasks.loading import load_task

EXPERTS = tuple(SKILLS)
UNSEEN = tuple(SKILLS.values())


@pytest.fixture
def small(monkeypatch) -> None:
    """A demo of a few steps and examples, without a sentence embedder."""
    few = {"steps": 1, "eval_every": 1, "batch_size": 2, "eval_examples": 2}
    changes = {
        "TRAINING": replace(demo.TRAINING, **few),
        "GATES": replace(demo.GATES, gate_steps=1, statistics_examples=2),
        "LORA": replace(demo.LORA, rank=2),
        **{"EVALUATED": 3, "READ": 2, "THREADS": 1, "can_embed": lambda: False},
    }
    for name, value in changes.items():
        monkeypatch.setattr(demo, name, value)


@pytest.mark.usefixtures("small")
def test_the_demo_leaves_experts_tables_a_report_and_a_model_and_goes_on_where_it_stopped(
    base_folders, phat, tmp_path
):
    out = tmp_path / "demo"
    words = ("demo", "--base", base_folders["llama"], "--out", out)
    assert phat(*words, "--all-methods").code == 0
    comparison = json.loads((out / "comparison.json").read_text())
    no_examples = {"retrieval", "centroid"}  # not embedded
    assert set(METHODS) - set(comparison["rows"]) == no_examples
    scored = (out / "results.jsonl").read_bytes()
    outcome = phat(*words)
    assert (out / "results.jsonl").read_bytes() == scored  # all was there already
    assert outcome.code == 0
    for part in (*EXPERTS, "Base model", "PHATGOOSE", "Oracle *", "over sentiment", "Done"):
        assert part in outcome.out
    assert "answered in writing" in outcome.out
    assert f"Report -> {out / 'analysis' / 'report.html'}" in outcome.out
    told = outcome.out.partition("Three commands to try next:\n")[2].splitlines()[:3]
    assert [shlex.split(line)[1] for line in told] == ["generate", "demo", "train"]
    comparison = json.loads((out / "comparison.json").read_text())
    routed = composition_of(load(out / "routed"))
    shown = {"base", "merged", "phatgoose", "oracle", routed.routing.router}
    assert (set(comparison["rows"]), routed.experts) == (shown, EXPERTS)
    assert comparison["suites"] == {"unseen": list(UNSEEN)}
    assert {row["n"] for row in comparison["rows"]["phatgoose"]["datasets"].values()} == {3}
    assert sorted(comparison["experts"]) == sorted(EXPERTS)
    assert "<html" in (out / "analysis" / "report.html").read_text(encoding="utf-8")
    for expert in Pool.open(out / "experts").experts:
        assert expert.info.hyperparameters["seed"] == 0
        unseen = load_task(TASKS / f"{SKILLS[expert.name]}.csv").test
        assert len(expert.prompts) == 3
        assert {*expert.prompts} < {row.input for row in unseen}


DIGEST = "15d4f9dda407979b51a3ef2d3d6da494c8ebb34d453d00e5b77cd1bcfb201074"


def test_its_rows_are_distinct_and_no_unseen_task_has_a_row_that_is_trained_on():
    def inputs_of(names, split):
        tasks = (load_task(TASKS / f"{name}.csv") for name in names)
        return [[row.input for row in getattr(task, split)] for task in tasks]

    trained, unseen = inputs_of(EXPERTS, "train"), inputs_of(UNSEEN, "test")
    assert all(len(set(rows)) == len(rows) >= 200 for rows in trained)
    assert all(len(set(rows)) == len(rows) == demo.EVALUATED for rows in unseen)
    assert not {*chain(*trained)} & {*chain(*unseen)}


def test_its_files_hold_the_rows_that_the_results_in_its_page_were_measured_on():
    digests = "".join(load_task(TASKS / f"{name}.csv").digest for name in (*EXPERTS, *UNSEEN))
    assert hashlib.sha256(digests.encode()).hexdigest() == DIGEST


def test_the_verdict_has_lifts_and_gains_the_smallest_first():
    comparison = made_comparison()
    lines = verdict(comparison, "phatgoose", {"e1": "a", "e0": "b"}).splitlines()
    assert lines[1] == "  e1 +50, e0 +50"
    gains = [float(line.split()[0]) for line in lines[3:]]
    assert gains == sorted(gains)
    mean = {name: sum(r.score for r in rows.values()) for name, rows in comparison.results.items()}
    singles = {n: sum(r.score for r in rows.values()) for n, rows in comparison.experts.items()}
    by_name = {line.split()[-1]: gain for line, gain in zip(lines[3:], gains, strict=True)}
    for name, other in {"base": mean["base"], **singles}.items():
        assert by_name.pop(name) == pytest.approx(100 * (mean["phatgoose"] - other) / 3, abs=0.06)
    assert not by_name
