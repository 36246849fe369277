"""Suites of one's own, and the table of all suites."""

from pathlib import Path

import pytest

from fake_packages import install
from odd_files import one_line_of
from phatgoose.errors import TaskError
from phatgoose.tasks.suites import registry
from phatgoose.tasks.suites.registry import SUITES, open_suite
from phatgoose.tasks.task import Example

FULL = """
name = "my-suite"
suffix = "\\nAnswer:"

[[tasks]]
file = "mine/b.jsonl"
name = "questions"
metrics = ["accuracy", "rouge-l"]
max_new_tokens = 8

[[tasks]]
file = "mine/a.csv"
suffix = ""
"""
COUNTS = {"t0hi": 36, "t0ho": 11, "flan": 166, "bbh": 22, "bbl": 17, "bbh-23": 23, "bbl-24": 24}


def write(folder: Path, text: str) -> Path:
    (folder / "suite.toml").write_text(text, encoding="utf-8")
    return folder / "suite.toml"


def test_the_papers_suites_are_known_by_name(folder, monkeypatch):
    suites = {name: open_suite(name) for name in SUITES}
    assert {suite.name: len(set(suite.names)) for suite in suites.values()} == COUNTS
    folder.rename(folder.parent / "bbh")
    monkeypatch.chdir(folder.parent)
    assert open_suite("bbh").names == suites["bbh"].names
    assert open_suite("./bbh").names == open_suite(Path("bbh")).names == ("a", "b")


def test_a_folders_visible_task_files_are_its_suite(folder):
    (folder / "._a.jsonl").write_bytes(b"\0\5\26\7")  # what macOS puts beside a file
    suite = open_suite(str(folder))
    assert (suite.name, suite.names) == ("mine", ("a", "b"))
    first, second = suite.load()
    assert first.test == (Example("1+1", "2"),)
    assert second.test == (Example("Is it?", "yes", ("yes", "no")),)
    assert second.train == (Example("Will it?", "no", (), ("no", "never")),)
    assert (second.name, second.metrics, second.max_new_tokens) == ("b", (), None)


def test_a_toml_file_lists_tasks_and_how_they_are_scored(folder):
    suite = open_suite(write(folder.parent, FULL))
    assert (suite.name, suite.names) == ("my-suite", ("questions", "a"))
    task, other = suite.load()
    assert (task.name, task.source) == ("questions", "b.jsonl")
    assert (task.metrics, task.max_new_tokens) == (("accuracy", "rouge-l"), 8)
    # The suffix is appended to every input.
    assert task.test == (Example("Is it?\nAnswer:", "yes", ("yes", "no")),)
    assert task.validation == (Example("Was it?\nAnswer:", "no"),)
    assert task.train == (Example("Will it?\nAnswer:", "no", (), ("no", "never")),)
    assert other.test == (Example("1+1", "2"),)


TASK = '[[tasks]]\nfile = "b.jsonl"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae = 'x'\n" + TASK, "nmae: Extra inputs are not permitted, got 'x'"),
        (TASK + "metric = ['accuracy']", "tasks.0.metric: Extra inputs are not permitted"),
        (TASK + "max_new_tokens = 0", "max_new_tokens: Input should be greater than 0"),
        (TASK + TASK, "Two tasks are called 'b'; give them different names."),
    ],
)
def test_a_suite_that_can_not_be_meant_is_refused(folder, text, message):
    told = one_line_of(lambda: open_suite(write(folder, text)), TaskError)
    assert message in told


def test_what_is_no_suite_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"'bbq' is neither a known name \(t0hi, .* Did you mean"):
        open_suite("bbq")
    with pytest.raises(TaskError, match=r"nowhere\.toml does not exist"):
        open_suite("nowhere.toml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match="empty is not valid: tasks: "):
        open_suite(tmp_path / "empty")


def test_a_suite_of_another_package_is_known_by_name(tmp_path, monkeypatch):
    code = "from phatgoose.tasks.task import Suite\n"
    code += "from phatgoose.tasks.suites.registry import SuiteRecord\n"
    code += "MINE = SuiteRecord(lambda: Suite('mine', ()), trainable=True)\n"
    points = {registry.GROUP: {"mine": "their_suites:MINE", "t0ho": "their_suites:MINE"}}
    install(tmp_path, monkeypatch, "their_suites", code, points)
    monkeypatch.setattr(registry, "SUITES", dict(registry.SUITES))
    registry.known_suites.cache_clear()
    with pytest.warns(UserWarning, match="t0ho of their-suites is left out"):
        assert open_suite("mine").name == "mine"
    registry.known_suites.cache_clear()
