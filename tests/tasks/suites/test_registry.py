"""The table of all suites."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fake_packages import install
from phatgoose.errors import TaskError
from phatgoose.tasks.suites import registry
from phatgoose.tasks.suites.entries import Entry, Suite
from phatgoose.tasks.suites.registry import SUITES, open_suite
from suite_files import FULL, write


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
    assert "nor a folder of task files nor a .toml, .jsonl or .csv file" in message
    with pytest.raises(TaskError, match="can't be read"):
        open_suite(tmp_path / "nowhere.toml")


def test_listing_the_suites_loads_no_heavy_library():
    code = (
        "import sys, phatgoose.tasks.suites.registry as s; [r.open() for r in s.SUITES.values()];"
        "print({'torch', 'transformers', 'datasets', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_suite_of_another_package_is_known_by_name(tmp_path, monkeypatch):
    code = "from phatgoose.tasks.suites.entries import Suite\n"
    code += "from phatgoose.tasks.suites.registry import SuiteRecord\n"
    code += "MINE = SuiteRecord(lambda: Suite('mine', ()), trainable=True)\n"
    points = {registry.GROUP: {"mine": "their_suites:MINE", "t0ho": "their_suites:MINE"}}
    install(tmp_path, monkeypatch, "their_suites", code, points)
    monkeypatch.setattr(registry, "SUITES", dict(registry.SUITES))
    registry._add_others.cache_clear()
    with pytest.warns(UserWarning, match="t0ho is left out: the name 't0ho' is taken"):
        assert open_suite("mine").name == "mine"
    registry._add_others.cache_clear()
