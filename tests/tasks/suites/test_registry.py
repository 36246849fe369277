"""Suites of one's own, the table of all suites, and what may be named to train on."""

import re
from pathlib import Path

import pytest

from command_line import FLAGS, open_row, refused, write_rows
from fake_packages import install
from odd_files import one_line_of
from phatgoose.errors import TaskError
from phatgoose.tasks.suites import registry
from phatgoose.tasks.suites.registry import SUITES, mixture, open_suite, open_tasks
from phatgoose.tasks.task import Example

FULL = """
name = "my-suite"
suffix = "\\nAnswer:"
tasks = [
  { file = "mine/b.jsonl", name = "questions", metrics = ["accuracy", "bleu"], max_new_tokens = 8 },
  { file = "mine/a.csv", suffix = "" },
]
"""
COUNTS = {"t0hi": 36, "t0ho": 11, "flan": 166, "bbh": 22, "bbl": 17, "bbh-23": 23, "bbl-24": 24}
ROWS = [
    {"input": "Is it?", "target": "yes", "choices": ["yes", "no"], "split": "test"},
    {"input": "Will it?", "target": "no", "references": ["no", "never"]},
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """The current folder: task files alone, in a folder and in a suite file."""
    write_rows(tmp_path / "counting.jsonl", [open_row(i) for i in range(12)])
    write_rows(tmp_path / "samsum.jsonl", [open_row(i) for i in range(8)])
    write_rows(tmp_path / "broken.jsonl", [open_row(0), {"input": "x"}])
    write_rows(tmp_path / "graded.jsonl", [open_row(i) | {"split": "validation"} for i in (1, 2)])
    (tmp_path / "mine").mkdir()
    write_rows(tmp_path / "mine" / "b.jsonl", ROWS)
    (tmp_path / "mine" / "a.csv").write_text("input,target,split\n1+1,2,test\n")
    (tmp_path / "mine" / "notes.txt").write_text("not a task")
    (tmp_path / "mine" / "._a.jsonl").write_bytes(b"\0\5\26\7")  # what macOS puts beside a file
    (tmp_path / "some.toml").write_text('tasks = [{ file = "counting.jsonl", name = "numbers" }]')
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- to evaluate on ---


def test_the_papers_suites_are_known_by_name(here):
    suites = {name: open_suite(name) for name in SUITES}
    assert {suite.name: len(set(suite.names)) for suite in suites.values()} == COUNTS
    (here / "mine").rename(here / "bbh")
    assert open_suite("bbh").names == suites["bbh"].names
    assert open_suite("./bbh").names == open_suite(Path("bbh")).names == ("a", "b")


def test_a_folders_visible_task_files_are_its_suite():
    suite = open_suite("mine")
    assert (suite.name, suite.names) == ("mine", ("a", "b"))
    first, second = suite.load()
    assert first.test == (Example("1+1", "2"),)
    assert second.test == (Example("Is it?", "yes", ("yes", "no")),)
    assert second.train == (Example("Will it?", "no", (), ("no", "never")),)
    assert (second.name, second.metrics, second.max_new_tokens) == ("b", (), None)


def test_a_toml_file_lists_tasks_and_how_they_are_scored(here):
    (here / "suite.toml").write_text(FULL, encoding="utf-8")
    suite = open_suite("suite.toml")
    assert (suite.name, suite.names) == ("my-suite", ("questions", "a"))
    task, other = suite.load()
    assert (task.name, task.source) == ("questions", "b.jsonl")
    assert (task.metrics, task.max_new_tokens) == (("accuracy", "bleu"), 8)
    # The suffix is appended to every input.
    assert task.test == (Example("Is it?\nAnswer:", "yes", ("yes", "no")),)
    assert task.train == (Example("Will it?\nAnswer:", "no", (), ("no", "never")),)
    assert other.test == (Example("1+1", "2"),)


TASK = '[[tasks]]\nfile = "counting.jsonl"\n'


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nmae = 'x'\n" + TASK, "nmae: Extra inputs are not permitted, got 'x'"),
        (TASK + "metric = ['accuracy']", "tasks.0.metric: Extra inputs are not permitted"),
        (TASK + "max_new_tokens = 0", "max_new_tokens: Input should be greater than 0"),
        (TASK + TASK, "Two tasks are called 'counting'; rename one."),
        ("bbq", "'bbq' is neither a known name (t0hi, "),
        ("nowhere.toml", "nowhere.toml does not exist"),
        ("empty", "empty is not valid: tasks: "),
    ],
)
def test_what_is_no_suite_or_can_not_be_meant_is_refused(here, place, message):
    (here / "empty").mkdir()
    if "\n" in place:
        (here / "suite.toml").write_text(place, encoding="utf-8")
        place = "suite.toml"
    assert message in one_line_of(lambda: open_suite(place), TaskError)


def test_a_suite_of_another_package_is_known_by_name(tmp_path, monkeypatch):
    code = "from phatgoose.tasks.task import Suite\n"
    code += "from phatgoose.tasks.suites.registry import SuiteRecord\n"
    code += "MINE = SuiteRecord(lambda: Suite('mine', ()), trainable=True)\n"
    points = {registry.GROUP: {"theirs": "their_suites:MINE", "t0ho": "their_suites:MINE"}}
    install(tmp_path, monkeypatch, "their_suites", code, points)
    registry.known_suites.cache_clear()
    with pytest.warns(UserWarning, match="t0ho of their-suites is left out"):
        assert open_suite("theirs").name == "mine"
    registry.known_suites.cache_clear()


# --- to train on ---


def test_suites_files_and_hub_datasets_are_opened_in_order_and_nothing_is_loaded(here):
    sources = ["t0hi/trec", "counting.jsonl", "mine", "some.toml", "hub:a/b:c@main", "flan/wic"]
    tasks = open_tasks(sources)
    assert [(task.name, task.named, task.origin) for task in tasks] == [
        ("trec", "t0hi/trec", "hub"),
        ("counting", "counting.jsonl", "file"),
        ("a", "mine/a", "file"),
        ("b", "mine/b", "file"),
        ("numbers", "some.toml/numbers", "file"),
        ("a--b--c", "hub:a/b:c@main", "hub"),
        ("wic", "flan/wic", "hub"),
    ]
    assert tasks[0].entry.source == "CogComp/trec, prompts of P3"
    assert tasks[2].entry.source == str(Path("mine/a.csv"))
    (here / "counting.jsonl").write_text("broken")
    assert open_tasks(["counting.jsonl"])  # it isn't looked into


def test_what_cannot_be_trained_on_is_refused():
    for source, options, complaint in (
        ("t0hi/ag_new", {}, "Suite t0hi has no dataset 'ag_new'; it has ag_news"),
        ("t0ho", {}, "Suite t0ho is only for evaluation"),
        ("mine", {"template": "{{a}} ||| no"}, "template is for task files and hub:DATASET; mine"),
    ):
        with pytest.raises(TaskError, match=re.escape(complaint)):
            open_tasks([source], **options)


def test_a_mixture_is_one_task_that_knows_its_size_as_far_as_its_parts_do(hub_copies):
    parts = open_tasks(["t0hi/trec", "t0hi/quarel"])
    assert mixture(parts, "all").entry.train_examples == 5452 + 1941 * 5
    capped = mixture(parts, "all", most=6000)
    assert (capped.entry.train_examples, capped.origin) == (5452 + 6000, "hub")
    mixed = mixture(open_tasks(["t0hi/samsum", "counting.jsonl"], hub_copies), "all", most=7)
    assert (mixed.name, mixed.origin, mixed.entry.train_examples) == ("all", "copy", None)
    assert len(mixed.load().train) == 7 + 7


@pytest.mark.parametrize(
    ("file", "complaint"),
    [  # a mistake in one's own file isn't found out after hours of training
        ("samsum.jsonl", "Two tasks are called 'samsum'"),
        ("broken.jsonl", "broken.jsonl, line 2 is not valid: target is missing"),
        ("graded.jsonl", "'graded' has 0 training examples"),
    ],
)
def test_what_is_wrong_is_told_before_any_training(
    here, base_folders, hub_copies, phat, file, complaint
):
    places = ["--data", hub_copies.data, "--templates", hub_copies.templates]
    flags = ["--base", base_folders["llama"], "--out", "new", *places, *FLAGS]
    refused(phat("train", "t0hi/samsum", file, *flags), complaint)
    assert not (here / "new").exists()
