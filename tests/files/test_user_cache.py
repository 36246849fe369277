"""Where things made once for a user are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from phatgoose.files.atomic import user_cache


def test_it_is_where_xdg_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "phatgoose"


@pytest.mark.parametrize("named", [None, "", "here/relative"])
def test_it_is_below_home_where_xdg_says_nothing_absolute(tmp_path, monkeypatch, named):
    monkeypatch.setattr(Path, "expanduser", lambda path: tmp_path / path.relative_to("~"))
    if named is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", named)
    assert user_cache() == tmp_path / ".cache" / "phatgoose"
