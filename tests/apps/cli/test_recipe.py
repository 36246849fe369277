"""Recipes: what they may hold, and what is relative to them."""

import pytest

from phatgoose.apps.cli.options import read_recipe
from phatgoose.errors import ConfigError


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipes").mkdir()

    def write(text):
        path = tmp_path / "recipes" / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_what_is_there_is_relative_to_the_recipe_and_other_names_stay(recipe, tmp_path):
    (tmp_path / "a.jsonl").touch()
    for name in ("mine", "hub", "smollm2"):
        (tmp_path / "recipes" / name).mkdir()
    tasks = ["../a.jsonl", "hub:owner/c@main", "t0hi", "flan/niv2_misc", "/elsewhere/d.jsonl"]
    read = read_recipe(recipe(f'tasks = {tasks}\nbase = "mine"\ndata = "hub"\ntemplates = "/p3"'))
    here = tmp_path / "recipes"
    assert read["tasks"] == [str(here / "../a.jsonl"), *tasks[1:]]
    assert [read[name] for name in ("base", "data", "templates")] == [
        *(str(here / "mine"), str(here / "hub"), "/p3")
    ]
    for base in ("owner/mine", "smollm2"):  # the bundled one, whatever lies there
        assert read_recipe(recipe(f'base = "{base}"'))["base"] == base


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("bass = 'x'", "bass is 'x'; known are tasks"),
        ("lora = 3", r"lora is 3; known are .*lora \(dict\)"),
        ("[ia3]\nrank = 4", r"\[ia3\]: unknown setting 'rank'; known are sites"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_name_and_the_reason(recipe, text, complaint):
    path = recipe(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
