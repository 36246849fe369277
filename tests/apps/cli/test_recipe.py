"""Recipes: what they may hold, and what is relative to them."""

import pytest

from phatgoose.apps.cli.options import read_recipe
from phatgoose.errors import ConfigError


def write(folder, text):
    (folder / "recipes").mkdir(exist_ok=True)
    path = folder / "recipes" / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_there_is_relative_to_the_recipe_and_other_names_stay(tmp_path):
    (tmp_path / "a.jsonl").touch()
    here = tmp_path / "recipes"
    for name in ("mine", "hub", "smollm2"):
        (here / name).mkdir(parents=True)
    tasks = ["../a.jsonl", "hub:owner/c@main", "t0hi", "flan/niv2_misc", "/elsewhere/d.jsonl"]
    text = f'tasks = {tasks}\nbase = "mine"\ndata = "hub"\ntemplates = "/p3"'
    read = read_recipe(write(tmp_path, text))
    assert read["tasks"] == [str(here / "../a.jsonl"), *tasks[1:]]
    places = [read[name] for name in ("base", "data", "templates")]
    assert places == [str(here / "mine"), str(here / "hub"), "/p3"]
    for base in ("owner/mine", "smollm2"):  # the bundled one, whatever lies there
        assert read_recipe(write(tmp_path, f'base = "{base}"'))["base"] == base


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("bass = 'x'", "bass is 'x'; known are tasks"),
        ("lora = 3", r"lora is 3; known are .*lora \(dict\)"),
        ("[ia3]\nrank = 4", r"\[ia3\]: unknown setting 'rank'; known are sites"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_name_and_the_reason(tmp_path, text, complaint):
    with pytest.raises(ConfigError, match=rf"recipes/recipe\.toml.*{complaint}"):
        read_recipe(write(tmp_path, text))
