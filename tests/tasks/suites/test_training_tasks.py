"""What may be named to train on, and that each task is loaded when its training starts."""

import gc
import re
import weakref
from pathlib import Path

import pytest

from command_line import FLAGS, open_row, refused, review, write_rows
from phatgoose.errors import TaskError
from phatgoose.experts.expert import Expert
from phatgoose.tasks.suites import p3
from phatgoose.tasks.suites.registry import mixture, open_tasks
from phatgoose.training import pool_jobs as training_module

datasets = pytest.importorskip("datasets")

SHORT = [*FLAGS, "--steps", 1, "--gate-steps", 1, "--sites", "q_proj", "--no-means"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder: task files alone, in a folder and in a suite file."""
    write_rows(tmp_path / "counting.jsonl", [open_row(i) for i in range(12)])
    write_rows(tmp_path / "broken.jsonl", [open_row(0), {"input": "x"}])
    write_rows(tmp_path / "single.jsonl", [open_row(0)])
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


def test_templates_are_for_files_and_the_hub(here):
    write_rows(here / "raw.jsonl", [{"text": f"t{i}"} for i in range(3)])
    (task,) = open_tasks(["raw.jsonl"], template="{{text}}? ||| no", choices="yes ||| no")
    assert task.load().train[1].choices == ("yes", "no")
    with pytest.raises(TaskError, match="template is for task files and hub:DATASET; mine has"):
        open_tasks(["mine"], template="{{text}}? ||| no")


BAD_SOURCES = [
    ("t1hi", "Suite 't1hi' is neither a known name"),
    ("t0hi/ag_new", "Suite t0hi has no dataset 'ag_new'; it has ag_news"),
    ("some.toml/reviews", "Suite some has no dataset 'reviews'; it has numbers"),
    ("nowhere.toml", "nowhere.toml does not exist"),
    ("t0ho", "Suite t0ho is only for evaluation"),
    ("", "Suite '' is neither a known name"),
]


@pytest.mark.parametrize(("source", "complaint"), BAD_SOURCES)
def test_what_cannot_be_trained_on_is_refused(here, source, complaint):
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


@pytest.fixture
def tiny(base_folders, hub_copies, here) -> list[object]:
    """The arguments of a short training run with the made-up copies."""
    places = ["--data", hub_copies.data, "--templates", hub_copies.templates]
    return ["--base", base_folders["llama"], "--out", "new", *places, *SHORT]


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What is read and trained, in order; a task that outlives its training is told too."""
    seen: list[str] = []
    trained: list[weakref.ref] = []
    real_rows, real_train = p3.read_rows, training_module.train_expert

    def read_rows(sources, dataset, config, split):
        seen.append(f"read {dataset.split('/')[-1]} {split}")
        return real_rows(sources, dataset, config, split)

    def train_expert(base, task, **options):
        gc.collect()
        seen.extend("still there" for reference in trained if reference() is not None)
        trained.append(weakref.ref(task))
        seen.append(f"train {task.name}")
        return real_train(base, task, **options)

    monkeypatch.setattr(p3, "read_rows", read_rows)
    monkeypatch.setattr(training_module, "train_expert", train_expert)
    return seen


ONE = ["read rotten_tomatoes train", "read rotten_tomatoes validation", "train rotten_tomatoes"]
TWO = ["read samsum train", "read samsum validation", "train samsum"]


def test_each_task_is_loaded_when_its_training_starts_and_freed_after_it(tiny, phat, events):
    outcome = phat("train", "t0hi/rotten_tomatoes", "t0hi/samsum", *tiny)
    assert (outcome.code, outcome.err) == (0, "")
    assert events == [*ONE, *TWO]
    lines = outcome.out.splitlines()
    assert lines[0].startswith("[1/2] rotten_tomatoes: validation loss")
    assert lines[1].endswith("-> new/samsum")
    record = Expert.load(Path("new/samsum")).info.task
    assert record["source"] == "knkarthick/samsum, prompts of P3"
    events.clear()
    assert phat("train", "t0hi/rotten_tomatoes", "t0hi/samsum", *tiny, "--resume").code == 0
    assert events == []  # what is finished isn't even read


CLASHES = [
    (["t0hi/samsum", "mine"], "Two tasks are named 'samsum'"),
]
TOO_LATE_ELSEWHERE = [  # a mistake in one's own file isn't found out after hours of training
    (["t0hi/samsum", "broken.jsonl"], "broken.jsonl, line 2 is not valid: target is missing"),
    (["t0hi/samsum", "single.jsonl"], "at least two"),
    (["t0hi/samsum", "graded.jsonl"], "'graded' has 0 training examples"),
]


@pytest.mark.parametrize(("sources", "complaint"), [*CLASHES, *TOO_LATE_ELSEWHERE])
def test_what_is_wrong_is_told_before_any_training(tiny, phat, events, sources, complaint):
    refused(phat("train", *sources, *tiny), complaint)
    assert events == []
    assert not Path("new").exists()
