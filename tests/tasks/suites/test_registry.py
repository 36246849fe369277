"""Suites of one's own, and the table of all suites."""

from pathlib import Path

import pytest

from fake_packages import install
from phatgoose.errors import TaskError
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.suites import registry
from phatgoose.tasks.suites.registry import SUITES, local_suite, open_suite
from phatgoose.tasks.task import Entry, Example, Sources, Suite

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


def write(folder: Path, text: str) -> Path:
    (folder / "suite.toml").write_text(text, encoding="utf-8")
    return folder / "suite.toml"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("t0hi", 36),
        ("t0ho", 11),
        ("flan", 166),
        ("bbh", 22),
        ("bbl", 17),
        ("bbh-23", 23),
        ("bbl-24", 24),
    ],
)
def test_the_papers_suites_are_known_by_name(name, count):
    suite = open_suite(name)
    assert isinstance(suite, Suite)
    assert suite.name == name
    assert len(set(suite.names)) == len(suite.entries) == count
    assert all(isinstance(entry, Entry) for entry in suite.entries)


def test_open_suite_takes_known_names_folders_and_toml_files(folder, monkeypatch):
    assert list(SUITES) == ["t0hi", "t0ho", "flan", "bbh", "bbl", "bbh-23", "bbl-24"]
    assert open_suite(folder).names == ("a", "b")
    assert open_suite(str(write(folder.parent, FULL))).name == "my-suite"
    folder.rename(folder.parent / "bbh")
    monkeypatch.chdir(folder.parent)
    assert len(open_suite("bbh").names) == 22
    assert open_suite("./bbh").names == ("a", "b")
    assert open_suite(Path("bbh")).names == ("a", "b")


def test_an_unknown_suite_lists_the_known_ones(tmp_path):
    with pytest.raises(TaskError) as caught:
        open_suite("bbq")
    message = str(caught.value)
    assert (
        "Suite 'bbq' is neither a known name (t0hi, t0ho, flan, bbh, bbl, bbh-23, bbl-24)"
        in message
    )
    assert "nor a folder of task files nor a .toml, .jsonl, .json, .csv or .parquet file" in message
    with pytest.raises(TaskError, match="can't be read"):
        open_suite(tmp_path / "nowhere.toml")


def complaint(path: Path) -> str:
    with pytest.raises(TaskError) as caught:
        local_suite(path)
    return str(caught.value)


def test_a_task_file_is_a_suite_of_its_own(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"input": "a", "target": "x"}\n')
    suite = open_suite(tmp_path / "one.jsonl")
    assert (suite.name, suite.names) == ("one", ("one",))
    assert suite.load() == (load_task(tmp_path / "one.jsonl"),)


def test_a_folders_task_files_are_its_suite(folder):
    suite = local_suite(folder)
    assert suite.name == "mine"
    assert suite.names == ("a", "b")
    first, second = suite.load()
    assert first.test == (Example("1+1", "2"),)
    assert second.name == "b"
    assert second.test == (Example("Is it?", "yes", ("yes", "no")),)
    assert second.validation == (Example("Was it?", "no"),)
    assert second.train == (Example("Will it?", "no", (), ("no", "never")),)
    assert (second.metrics, second.max_new_tokens) == ((), None)


def test_a_toml_file_lists_tasks_and_how_they_are_scored(folder):
    suite = local_suite(write(folder.parent, FULL))
    assert suite.name == "my-suite"
    assert suite.names == ("questions", "a")
    entry = suite.entry("questions")
    assert (entry.metrics, entry.max_new_tokens) == (("accuracy", "rouge-l"), 8)
    assert (entry.micro_batch_size, entry.train_examples) == (None, None)
    task = entry.read(Sources())
    assert task.name == "questions"
    assert (task.metrics, task.max_new_tokens) == (("accuracy", "rouge-l"), 8)
    assert task.source == "b.jsonl"


def test_the_suffix_is_appended_to_every_input(folder):
    first, second = local_suite(write(folder.parent, FULL)).load()
    assert first.test == (Example("Is it?\nAnswer:", "yes", ("yes", "no")),)
    assert first.validation == (Example("Was it?\nAnswer:", "no"),)
    assert first.train == (Example("Will it?\nAnswer:", "no", (), ("no", "never")),)
    assert second.test == (Example("1+1", "2"),)


def test_name_and_suffix_have_defaults(folder):
    suite = local_suite(write(folder, '[[tasks]]\nfile = "b.jsonl"\n'))
    assert (suite.name, suite.names) == ("suite", ("b",))
    assert suite.load()[0].test[0].input == "Is it?"


def test_files_are_read_when_an_entry_is(folder):
    (folder / "b.jsonl").write_text("{broken", encoding="utf-8")
    suite = local_suite(folder)
    with pytest.raises(TaskError, match=r"b\.jsonl, line 1: broken JSON"):
        suite.entry("b").read(Sources())


TASK = '[[tasks]]\nfile = "b.jsonl"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not valid TOML"),
        ("nmae = 'x'\n" + TASK, "suite.toml: unknown key 'nmae'; known are name, suffix, tasks."),
        (
            TASK + "metric = ['accuracy']",
            "suite.toml, task 1: unknown key 'metric'; known are file",
        ),
        ("name = 3\n" + TASK, "suite.toml: name is 3, but must be a text."),
        ("tasks = ['b.jsonl']", "tasks must be tables, each headed [[tasks]]."),
        ("name = 'x'", "suite.toml has no tasks"),
        ("[[tasks]]\nname = 'x'", "suite.toml, task 1: file is missing."),
        (
            "[[tasks]]\nfile = 'notes.txt'",
            "notes.txt, but must be a .jsonl, .json, .csv or .parquet file.",
        ),
        ("[[tasks]]\nfile = 'none.jsonl'", "none.jsonl does not exist."),
        (TASK + "name = ''", "task 1: name is empty; give one, or leave the key out for 'b'."),
        ("name = ''\n" + TASK, "suite.toml: name is empty; give one, or leave the key out for"),
        (TASK + "suffix = 3", "task 1: suffix is 3, but must be a text."),
        (TASK + "metrics = 'accuracy'", "metrics is 'accuracy', but must be a list such as"),
        (TASK + "max_new_tokens = 0", "max_new_tokens is 0, but must be a whole number above 0."),
        (TASK + "max_new_tokens = true", "max_new_tokens is True, but must be"),
        (TASK + TASK, "2 tasks are called 'b'; give them different names."),
    ],
)
def test_a_suite_that_can_not_be_meant_is_refused(folder, text, message):
    assert message in complaint(write(folder, text))


def test_what_is_no_suite_is_refused(folder, tmp_path):
    assert "Task file" in complaint(folder / "nowhere.jsonl")
    assert "must be a folder of task files, one of them, or a .toml" in complaint(tmp_path / "no")
    assert "can't be read: No such file" in complaint(tmp_path / "nowhere.toml")
    (tmp_path / "empty").mkdir()
    assert "empty has no tasks" in complaint(tmp_path / "empty")
    (folder / "b.csv").write_text("input,target\n1,2\n", encoding="utf-8")
    assert "2 tasks are called 'b'" in complaint(folder)


def test_hidden_files_are_no_tasks(folder):
    (folder / "._a.jsonl").write_bytes(b"\0\5\26\7")  # what macOS puts beside a file
    assert local_suite(folder).names == ("a", "b")


def test_a_suite_of_another_package_is_known_by_name(tmp_path, monkeypatch):
    code = "from phatgoose.tasks.task import Suite\n"
    code += "from phatgoose.tasks.suites.registry import SuiteRecord\n"
    code += "MINE = SuiteRecord(lambda: Suite('mine', ()), trainable=True)\n"
    points = {registry.GROUP: {"mine": "their_suites:MINE", "t0ho": "their_suites:MINE"}}
    install(tmp_path, monkeypatch, "their_suites", code, points)
    monkeypatch.setattr(registry, "SUITES", dict(registry.SUITES))
    registry.known_suites.cache_clear()
    with pytest.warns(UserWarning, match="t0ho is left out: the name 't0ho' is taken"):
        assert open_suite("mine").name == "mine"
    registry.known_suites.cache_clear()
