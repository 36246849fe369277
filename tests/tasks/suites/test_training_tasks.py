"""What may be named to train on, and that each task is loaded when its training starts."""

import re
from pathlib import Path

import pytest

from command_line import FLAGS, open_row, refused, review, write_rows
from phatgoose.errors import TaskError
from phatgoose.tasks.suites.registry import mixture, open_tasks

datasets = pytest.importorskip("datasets")

SHORT = [*FLAGS, "--steps", 1, "--gate-steps", 1, "--sites", "q_proj", "--no-means"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder: task files alone, in a folder and in a suite file."""
    write_rows(tmp_path / "counting.jsonl", [open_row(i) for i in range(12)])
    write_rows(tmp_path / "broken.jsonl", [open_row(0), {"input": "x"}])
    write_rows(tmp_path / "graded.jsonl", [open_row(i) | {"split": "validation"} for i in (1, 2)])
    (tmp_path / "mine").mkdir()
    write_rows(tmp_path / "mine" / "reviews.jsonl", [review(i) for i in range(8)])
    write_rows(tmp_path / "mine" / "samsum.jsonl", [review(i) for i in range(8)])
    (tmp_path / "some.toml").write_text('tasks = [{ file = "counting.jsonl", name = "numbers" }]')
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- opening ---


def test_suites_files_and_hub_datasets_are_opened_in_order_and_nothing_is_loaded(here):
    sources = ["t0hi/trec", "counting.jsonl", "mine", "some.toml", "hub:a/b:c@main", "flan/wic"]
    tasks = open_tasks(sources)
    assert [(task.name, task.named, task.origin) for task in tasks] == [
        ("trec", "t0hi/trec", "hub"),
        ("counting", "counting.jsonl", "file"),
        ("reviews", "mine/reviews", "file"),
        ("samsum", "mine/samsum", "file"),
        ("numbers", "some.toml/numbers", "file"),
        ("a--b--c", "hub:a/b:c@main", "hub"),
        ("wic", "flan/wic", "hub"),
    ]
    assert tasks[0].entry.source == "CogComp/trec, prompts of P3"
    assert tasks[2].entry.source == str(Path("mine/reviews.jsonl"))
    (here / "counting.jsonl").write_text("broken")
    assert open_tasks(["counting.jsonl"])  # it isn't looked into
    with pytest.raises(TaskError, match="template is for task files and hub:DATASET; mine has"):
        open_tasks(["mine"], template="{{text}}? ||| no")


def test_what_cannot_be_trained_on_is_refused(here):
    for source, complaint in (
        ("t0hi/ag_new", "Suite t0hi has no dataset 'ag_new'; it has ag_news"),
        ("t0ho", "Suite t0ho is only for evaluation"),
    ):
        with pytest.raises(TaskError, match=re.escape(complaint)):
            open_tasks([source])


def test_a_mixture_is_one_task_that_knows_its_size_as_far_as_its_parts_do(here, hub_copies):
    parts = open_tasks(["t0hi/trec", "t0hi/quarel"])
    assert mixture(parts, "all").entry.train_examples == 5452 + 1941 * 5
    capped = mixture(parts, "all", most=6000)
    assert (capped.entry.train_examples, capped.origin) == (5452 + 6000, "hub")
    parts = open_tasks(["t0hi/samsum", "counting.jsonl"], hub_copies)
    assert parts[0].load() is not parts[0].load()
    mixed = mixture(parts, "all", most=7)
    assert (mixed.name, mixed.origin, mixed.entry.train_examples) == ("all", "copy", None)
    assert len(mixed.load().train) == 7 + 7


# --- training ---


TOO_LATE_ELSEWHERE = [  # a mistake in one's own file isn't found out after hours of training
    (["t0hi/samsum", "mine"], "Two tasks are named 'samsum'"),
    (["t0hi/samsum", "broken.jsonl"], "broken.jsonl, line 2 is not valid: target is missing"),
    (["t0hi/samsum", "graded.jsonl"], "'graded' has 0 training examples"),
]


@pytest.mark.parametrize(("sources", "complaint"), TOO_LATE_ELSEWHERE)
def test_what_is_wrong_is_told_before_any_training(
    base_folders, hub_copies, here, phat, sources, complaint
):
    places = ["--data", hub_copies.data, "--templates", hub_copies.templates]
    flags = ["--base", base_folders["llama"], "--out", "new", *places, *SHORT]
    refused(phat("train", *sources, *flags), complaint)
    assert not Path("new").exists()
