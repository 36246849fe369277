"""The command line of compare: tables on the screen and on the disk, and one line for errors."""

import json
import re
import shutil
from pathlib import Path

import pytest

from command_line import open_row, review, write_rows
from phatgoose.base import load_base
from phatgoose.evaluation.rows import DERIVED, METHODS
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.routing.saved import save
from tiny import make_model, make_tokenizer, write_expert

SUITES = ["--suites", "a.toml,b"]
BOTH = [*SUITES, "--methods", "base,phatgoose", "--dtype", "float32", "--max-new-tokens", "2"]
LIMIT = ["--limit", "3"]
# These experts have no embeddings.
EMBEDDED = ("retrieval", "centroid")
# few-shot needs a file of examples.
RUN = [name for name in METHODS if name not in (*EMBEDDED, *DERIVED, "few-shot")]


@pytest.fixture(scope="module")
def workshop(base_folders, tmp_path_factory) -> Path:
    """A base, three experts without embeddings and two suites that share the dataset reviews."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(base_folders["llama"], folder / "tiny-base")
    base = load_base(folder / "tiny-base", dtype="float32")
    for z in range(3):
        write_expert(base, folder, f"e{z}", seed=z)
    (folder / "b").mkdir()
    reviews = [review(i, choices=["good", "bad", "so so"]) for i in range(8)]
    write_rows(folder / "b" / "reviews.jsonl", reviews)
    write_rows(folder / "b" / "counting.jsonl", [open_row(i) for i in range(4)])
    (folder / "a.toml").write_text('name = "a[bold]"\n[[tasks]]\nfile = "b/reviews.jsonl"\n')
    save(compose(Pool.open(folder / "experts"), base, k=1, router="phatgoose"), folder / "routed")
    make_model("llama", seed=1).save_pretrained(folder / "other-base")
    make_tokenizer(final_eos=False).save_pretrained(folder / "other-base")
    return folder


@pytest.fixture
def here(workshop, tmp_path, monkeypatch) -> Path:
    """A copy of the workshop, as the current folder."""
    folder = shutil.copytree(workshop, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")
    return folder


def scores_in(folder: Path) -> dict[str, dict[str, float]]:
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    return {
        name: {task: cell["score"] for task, cell in row["datasets"].items()}
        for name, row in rows.items()
    }


def test_compare_prints_a_table_and_writes_three_more(here, phat):
    outcome = phat("compare", "experts", *BOTH, *LIMIT, "--out", "x")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Base model" in outcome.out
    assert "PHATGOOSE" in outcome.out
    assert "all datasets (2)" in outcome.out
    assert "tables -> x/comparison.md, .json; runs -> x/results.jsonl" in outcome.out
    names = [".lock", "comparison.json", "comparison.md", "results.jsonl"]
    assert sorted(path.name for path in Path("x").iterdir()) == names
    assert len(Path("x/results.jsonl").read_bytes().splitlines()) == 4


def test_every_method_is_run_and_what_cannot_be_is_told_once(here, phat):
    arguments = [*SUITES, "--dtype", "float32", "--max-new-tokens", "2", *LIMIT, "--out", "x"]
    outcome = phat("compare", "experts", *arguments)
    assert outcome.code == 0
    for label in ("Retrieval", "Centroid"):
        assert f"{label} was left out: Experts 'e0', 'e1', 'e2' have no embeddings" in outcome.err
    assert len(outcome.err.splitlines()) == 2
    assert list(scores_in(Path("x"))) == [*RUN, *DERIVED]
    assert re.search(r"Oracle \*", outcome.out)
    assert "* not zero-shot" in outcome.out
    for methods in ("all", "all,base"):
        again = phat("compare", "experts", *arguments, "--methods", methods)
        assert (again.code, again.out) == (0, outcome.out)


def test_references_are_more_rows(here, phat):
    shutil.copytree("experts/e1", "a=b")
    places = {"one": "a=b", "of k 1": "routed", "joint": "experts", "other": "other-base"}
    references = [word for item in places.items() for word in ("--reference", "=".join(item))]
    outcome = phat("compare", "experts", *BOTH, *LIMIT, *references, "--out", "x")
    assert (outcome.code, outcome.err) == (0, "")
    scores = scores_in(Path("x"))
    assert list(scores) == ["base", "phatgoose", *places]
    assert scores["joint"] == scores["phatgoose"]
    assert all(label in outcome.out for label in places)


def test_a_recipe_is_followed_and_flags_win(here, phat):
    Path("r.toml").write_text("[routing]\nk = 1\n[formatting]\nmax_input_tokens = 4\n")

    def settings(*options: str) -> tuple[int, int]:
        arguments = ["--recipe", "r.toml", *BOTH, *LIMIT, "--out", "x", *options]
        assert phat("compare", "experts", *arguments).code == 0
        read = json.loads(Path("x/comparison.json").read_text())["settings"]
        return read["k"], read["formatting"]["max_input_tokens"]

    assert settings() == (1, 4)
    assert settings("--k", "3", "--max-input-tokens", "9") == (3, 9)


def test_its_scores_serve_oracle_and_best_individual(here, phat):
    methods = ["--methods", "oracle,best-individual"]
    options = ["--dtype", "float32", "--max-new-tokens", "2"]
    assert phat("compare", "experts", *SUITES, *methods, *options, "--out", "x").code == 0
    tasks = ["--task", "b/reviews.jsonl", "--task", "b/counting.jsonl"]
    for router in ("oracle", "best-individual"):
        routing = ["--router", router, "--scores", "x/comparison.json"]
        outcome = phat("evaluate", "experts", *tasks, *routing, *options, "--json", "s.json")
        assert outcome.code == 0, outcome.err
        scores = {t["task"]: t["score"] for t in json.loads(Path("s.json").read_text())["tasks"]}
        assert scores == scores_in(Path("x"))[router]
    chosen = json.loads(Path("x/comparison.json").read_text())["choices"]["best-individual"]
    (best,) = set(chosen.values())
    composed = phat("compose", "experts", *routing, "--out", "best")
    assert composed.code == 0, composed.err
    record = json.loads(Path("best/routed.json").read_text())["experts"]
    assert [expert["name"] for expert in record] == [best]
