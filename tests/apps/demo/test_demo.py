"""The demo on a tiny base with few steps."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest

from phatgoose.apps.demo import demo
from phatgoose.apps.demo.demo import SKILLS
from phatgoose.evaluation.comparison.methods import METHODS
from phatgoose.experts.pool import Pool
from phatgoose.routing.composition import composition_of
from phatgoose.routing.saved.load import load

EXPERTS = tuple(SKILLS)
UNSEEN = tuple(SKILLS.values())


@pytest.fixture
def small(monkeypatch) -> None:
    """A demo of a few steps and examples, without a sentence embedder."""
    few = {"steps": 1, "eval_every": 1, "batch_size": 2, "eval_examples": 2}
    monkeypatch.setattr(demo, "TRAINING", replace(demo.TRAINING, **few))
    gates = replace(demo.GATES, gate_steps=1, statistics_examples=2)
    monkeypatch.setattr(demo, "GATES", gates)
    monkeypatch.setattr(demo, "LORA", replace(demo.LORA, rank=2))
    monkeypatch.setattr(demo, "EVALUATED", 3)
    monkeypatch.setattr(demo, "READ", 2)
    monkeypatch.setattr(demo, "THREADS", 1)
    monkeypatch.setattr(demo, "can_embed", lambda: False)


@pytest.mark.usefixtures("small")
def test_the_demo_leaves_experts_tables_a_report_and_a_model_and_goes_on_where_it_stopped(
    base_folders, phat, tmp_path, monkeypatch
):
    out = tmp_path / "demo"
    shown = phat("demo", "--base", base_folders["llama"], "--out", out, "--seed", 3)
    assert shown.code == 0
    for part in (*EXPERTS, "Base model", "PHATGOOSE", "Oracle *", "over sentiment", "Done"):
        assert part in shown.out
    assert f"Report -> {out / 'analysis' / 'report.html'}" in shown.out
    told = shown.out.partition("Three commands to try next:\n")[2].splitlines()[:3]
    commands = [shlex.split(line) for line in told]
    assert [command[1] for command in commands] == ["generate", "demo", "train"]
    comparison = json.loads((out / "comparison.json").read_text())
    routed = composition_of(load(out / "routed"))
    assert set(comparison["rows"]) == {
        "base",
        "merged",
        "phatgoose",
        "oracle",
        routed.routing.router,
    }
    assert comparison["suites"] == {"unseen": list(UNSEEN)}
    written = json.loads((out / "gains.json").read_text())["written"]
    assert set(written) == set(UNSEEN)
    assert "answered in writing" in shown.out
    assert {row["n"] for row in comparison["rows"]["phatgoose"]["datasets"].values()} == {3}
    assert sorted(comparison["experts"]) == sorted(EXPERTS)
    assert "<html" in (out / "analysis" / "report.html").read_text(encoding="utf-8")
    assert routed.experts == EXPERTS
    for expert in Pool.open(out / "experts").experts:
        assert expert.info.hyperparameters["seed"] == 3
    every = phat(
        "demo", "--base", base_folders["llama"], "--out", out, "--seed", 3, "--all-methods"
    )
    assert every.code == 0
    comparison = json.loads((out / "comparison.json").read_text())
    embedded = {"retrieval", "centroid", "glider", "joint-discriminant"}
    assert set(METHODS) - set(comparison["rows"]) == embedded
    monkeypatch.setattr("phatgoose.evaluation.comparison.cells.score", None)  # all is there already
    again = phat("demo", "--base", base_folders["llama"], "--out", out, "--seed", 3)
    assert again.code == 0
