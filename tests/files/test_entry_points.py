"""Entry points of other packages: loaded, or left out with a warning that names the package."""

import pytest

from fake_packages import install
from phatgoose.files.entry_points import load_entry_points


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
