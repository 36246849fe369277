"""Recipes: what they may hold, and what is relative to them."""

from pathlib import Path

import pytest

from phatgoose.apps.cli.options import read_recipe
from phatgoose.errors import ConfigError


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_in_a_recipe_are_relative_to_it(tmp_path):
    absolute = str(tmp_path / "elsewhere" / "d.jsonl")
    tasks = ["a.jsonl", "../b.csv", "hub:owner/c@main", absolute]
    text = f'tasks = {tasks}\ndata = "../hub"\ntemplates = "/p3"'
    recipe = read_recipe(write_recipe(tmp_path, text))
    assert recipe.tasks == (*(str(tmp_path / task) for task in tasks[:2]), *tasks[2:])
    assert (recipe.data, recipe.templates) == (tmp_path / "../hub", Path("/p3"))


def test_suites_in_a_recipe_are_no_paths(tmp_path):
    tasks = ["t0hi", "flan/niv2_misc", "./t0hi", "t0hi/own.jsonl", "mine", "mine.toml/one"]
    assert read_recipe(write_recipe(tmp_path, f"tasks = {tasks}")).tasks == (
        "t0hi",
        "flan/niv2_misc",
        *(str(tmp_path / task) for task in tasks[2:]),
    )


def test_a_folder_beside_a_recipe_here_is_no_suite(tmp_path, monkeypatch):
    write_recipe(tmp_path, 'tasks = ["./flan", "./t0hi/ag_news", "./mine", "flan"]')
    monkeypatch.chdir(tmp_path)
    (name,) = (path.name for path in tmp_path.iterdir())
    assert read_recipe(Path(name)).tasks == ("./flan", "./t0hi/ag_news", "mine", "flan")


def test_a_base_or_embedder_is_relative_to_the_recipe_where_such_a_folder_is(tmp_path, monkeypatch):
    for name in ("mine", "emb", "other", "smollm2"):
        (tmp_path / "recipes" / name).mkdir(parents=True)
    (tmp_path / "here").mkdir()
    text = 'base = "{}"\n[gates]\nembedder = "{}"\nmeans = false\n[routing]\nembedder = "{}"\n'
    path = write_recipe(tmp_path / "recipes", text.format("mine", "./emb", "../recipes/other"))

    def named(path):
        recipe = read_recipe(path)
        gates, routing = recipe.tables["gates"], recipe.tables["routing"]
        assert gates["means"] is False
        return recipe.base, gates["embedder"], routing["embedder"]

    found = [str(path.parent / name) for name in ("mine", "emb", "../recipes/other")]
    assert named(path) == tuple(found)
    monkeypatch.chdir(path.parent)
    assert named(path.name) == ("mine", "./emb", "../recipes/other")
    names = ("owner/mine", "here", "x" * 300)
    assert named(write_recipe(path.parent, text.format(*names))) == names
    (path.parent / "recipe.toml").write_text('base = "smollm2"')
    assert read_recipe(path).base == "smollm2"  # the embedded one, whatever lies there


def test_a_recipe_may_be_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("base: owner/base\ntasks: [a.jsonl]\ntraining: {learning_rate: 2e-4, steps: 3}")
    recipe = read_recipe(path)
    assert (recipe.base, recipe.tasks) == ("owner/base", (str(tmp_path / "a.jsonl"),))
    assert recipe.tables["training"] == {"learning_rate": 2e-4, "steps": 3}
    for text, complaint in (
        ("training: [", "is not valid"),
        ("training: {step: 3}", r"\[training\]: unknown setting 'step'"),
        ("- 3", "wanted names with values"),
        ("a: !!python/name:os.system", "is not valid"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=complaint):
            read_recipe(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("base = ", "is not valid"),
        ("bass = 'x'", "unknown key 'bass'"),
        ("[training]\nstep = 3", r"\[training\]: unknown setting 'step'"),
        ("[lora]\nrank = 0", "rank is 0"),
        ("lora = 3", "lora is 3, but must be a table"),
        ("tasks = [1]", "tasks is .*, but must be a list"),
        ("data = 3", "data is 3"),
        ("dtype = 3", "dtype is 3, but must be a text"),
        ("peft = 'oft'", "peft is 'oft', but must be one of lora, ia3, bottleneck, dora"),
        ("[ia3]\nrank = 4", r"\[ia3\]: unknown setting 'rank'; known are sites"),
        ("[bottleneck]\nactivation = 'tanh'", "activation is 'tanh'"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_name_and_the_reason(tmp_path, text, complaint):
    path = write_recipe(tmp_path, text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
