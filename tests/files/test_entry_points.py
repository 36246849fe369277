"""Entry points of other packages: loaded, or left out with a warning that names the package."""

import warnings
from types import SimpleNamespace

import pytest

from fake_packages import install
from phatgoose.files import add_entry_points, load_entry_points


def test_a_broken_entry_point_is_named_and_does_not_break_the_others(tmp_path, monkeypatch):
    points = {"good": "their_pkg:THING", "bad": "their_pkg:MISSING", "worse": "no_such_pkg:X"}
    install(tmp_path, monkeypatch, "their_pkg", "THING = 7\n", {"phatgoose.tests": points})
    with pytest.warns(UserWarning, match="loaded") as warned:
        assert load_entry_points("phatgoose.tests") == {"good": 7}
    texts = sorted(str(warning.message) for warning in warned)
    assert "bad of their-pkg" in texts[0]
    assert "worse of their-pkg" in texts[1]


def test_a_group_that_nobody_registered_under_is_empty():
    assert load_entry_points("phatgoose.nothing") == {}


def test_records_are_added_by_name_and_others_are_named(tmp_path, monkeypatch):
    names = {"one": "other_pkg:ONE", "two": "other_pkg:ONE", "three": "other_pkg:TEXT"}
    code = "from types import SimpleNamespace as S\nONE, TEXT = S(), 'text'\n"
    install(tmp_path, monkeypatch, "other_pkg", code, {"phatgoose.tests": names})
    known = {"two": 2}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        add_entry_points("phatgoose.tests", known, SimpleNamespace)
    assert known.keys() == {"one", "two"}
    assert [str(each.message).split()[1] for each in warned] == ["three", "two"]
