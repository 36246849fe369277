"""Entry points of other packages: added by name, or left out with a warning that names them."""

import warnings
from types import SimpleNamespace

from fake_packages import install
from phatgoose.files import add_entry_points


def test_records_are_added_by_name_and_others_are_named(tmp_path, monkeypatch):
    names = {"one": "other_pkg:ONE", "two": "other_pkg:ONE", "three": "other_pkg:TEXT"}
    names |= {"bad": "other_pkg:MISSING", "worse": "no_such_pkg:X"}
    code = "from types import SimpleNamespace as S\nONE, TEXT = S(), 'text'\n"
    install(tmp_path, monkeypatch, "other_pkg", code, {"phatgoose.tests": names})
    known = {"two": 2}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        add_entry_points("phatgoose.tests", known, SimpleNamespace)
    assert known.keys() == {"one", "two"}
    told = [str(each.message) for each in warned]
    assert [text.split()[1] for text in told] == ["bad", "three", "two", "worse"]
    assert all("of other-pkg is left out" in text for text in told)
