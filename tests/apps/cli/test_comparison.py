"""The command line of compare: tables on the screen and on the disk."""

import json
import shutil
from pathlib import Path

import pytest

from command_line import BASE
from phatgoose.evaluation.compare import DERIVED, METHODS

SUITES = ["--suites", "a.toml,b", "--max-new-tokens", 2, "--limit", 3, "--out", "x", *BASE]
NOT_RUN = ("retrieval", "centroid")  # without embeddings


@pytest.fixture(autouse=True)
def suites(here, monkeypatch) -> None:
    """Two suites that share a dataset."""
    (here / "b").mkdir()
    for name in ("unseen", "counting"):
        shutil.copy(f"{name}.jsonl", "b")
    (here / "a.toml").write_text('name = "a[bold]"\n[[tasks]]\nfile = "unseen.jsonl"\n')
    monkeypatch.setenv("COLUMNS", "120")


def scores_in(folder: Path) -> dict[str, dict[str, float]]:
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    return {
        name: {task: cell["score"] for task, cell in row["datasets"].items()}
        for name, row in rows.items()
    }


def test_every_method_is_run_and_what_cannot_be_is_told_once(here, phat):
    outcome = phat("compare", "experts", *SUITES)
    assert outcome.code == 0, outcome.err
    for label in ("Retrieval", "Centroid"):
        assert f"{label} was left out: Experts" in outcome.err
    assert len(outcome.err.splitlines()) == 2
    run = [name for name in METHODS if name not in (*NOT_RUN, *DERIVED)]
    assert list(scores_in(Path("x"))) == [*run, *DERIVED]
    for said in ("PHATGOOSE", "all datasets (2)", "Oracle *", "* not zero-shot"):
        assert said in outcome.out
    assert "tables -> x/comparison.md, .json; runs -> x/results.jsonl" in outcome.out
    again = phat("compare", "experts", *SUITES, "--methods", "all,base")
    assert (again.code, again.out) == (0, outcome.out)


def test_references_are_more_rows_and_a_recipe_is_followed(here, phat):
    shutil.copytree("experts/reviews", "a=b")
    assert phat("compose", "experts", "--k", 1, "--out", "routed", *BASE).code == 0
    Path("r.toml").write_text("[routing]\nk = 1\n[formatting]\nmax_input_tokens = 4\n")
    places = {"one": "a=b", "of k 1": "routed", "joint": "experts", "other": "other-base"}
    more = [f"--reference={label}={place}" for label, place in places.items()]
    more += ["--recipe", "r.toml", "--methods", "base,phatgoose", "--k", 2]
    outcome = phat("compare", "experts", *SUITES, *more)
    assert outcome.code == 0, outcome.err
    scores = scores_in(Path("x"))
    assert list(scores) == ["base", "phatgoose", *places]
    assert scores["joint"] == scores["phatgoose"]
    settings = json.loads(Path("x/comparison.json").read_text())["settings"]
    assert (settings["k"], settings["formatting"]["max_input_tokens"]) == (2, 4)


def test_its_scores_serve_oracle_and_best_individual(phat):
    assert phat("compare", "experts", *SUITES, "--methods", "oracle,best-individual").code == 0
    tasks = ["--task", "b/unseen.jsonl", "--task", "b/counting.jsonl", *SUITES[2:6], *BASE]
    for router in ("oracle", "best-individual"):
        routing = ["--router", router, "--scores", "x/comparison.json"]
        outcome = phat("evaluate", "experts", *tasks, *routing, "--json", "-")
        scores = {task["task"]: task["score"] for task in json.loads(outcome.out)["tasks"]}
        assert scores == scores_in(Path("x"))[router]
