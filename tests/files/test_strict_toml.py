"""TOML of strangers: read within bounds, or refused in one line."""

from __future__ import annotations

import pytest

from odd_files import nested, one_line_of
from phatgoose.apps.cli.options import read_recipe
from phatgoose.errors import ConfigError, TaskError
from phatgoose.files.strict import MOST_TOML_BYTES, read_toml
from phatgoose.tasks.suites.registry import local_suite


@pytest.mark.parametrize("depth", [500, 100_000])
def test_deep_toml_is_one_line(tmp_path, depth):
    file = tmp_path / "a.toml"
    for text in (f"base = {nested(depth)}", "a." * depth + "b = 1", f"base = {'{a=' * depth}"):
        file.write_text(text)
        one_line_of(lambda: read_recipe(file), ConfigError)
        one_line_of(lambda: local_suite(file), TaskError)


def test_huge_toml_is_refused_unread(tmp_path):
    (tmp_path / "a.toml").write_text("#" * (MOST_TOML_BYTES + 1))
    told = one_line_of(lambda: read_toml(tmp_path / "a.toml", "Recipe", ConfigError))
    assert f"at most {MOST_TOML_BYTES}" in told
    (tmp_path / "a.toml").write_text("a = " + "9" * 5000)
    assert "not valid TOML" in one_line_of(lambda: read_recipe(tmp_path / "a.toml"))
    (tmp_path / "a.toml").write_text(f"base = [{', '.join(['1'] * 100_000)}]")
    one_line_of(lambda: read_recipe(tmp_path / "a.toml"), ConfigError)
    one_line_of(lambda: local_suite(tmp_path / "a.toml"), TaskError)
