"""Jobs, and what of them travels to other machines."""

from __future__ import annotations

from phatgoose.jobs import absolute


def test_names_stay_names_whatever_folders_are_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2", "mine"):
        (tmp_path / name).mkdir()
    assert absolute("mine") == str(tmp_path / "mine")
    names = ("smollm2", "hub:me/mine", "me/theirs")
    assert tuple(map(absolute, names)) == names
