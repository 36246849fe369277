"""The recipes that come with the project: valid, the paper's where they say so, and they run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from paths import ROOT
from phatgoose.apps.cli.options import ABOVE_TABLES, RECIPE_TABLES, read_recipe
from phatgoose.experts.expert import Expert
from phatgoose.tasks.suites.registry import known_suites, open_suite, open_tasks
from phatgoose.tasks.task import Suite
from toy_embedders import use_toy_embedder

RECIPES = ROOT / "recipes"
T5_XL = "google/t5-xl-lm-adapt"
THE_PAPERS = {  # its suite, their number, and those of them that there are made-up rows of
    "t5xl-t0.toml": ("t0hi", 36, ("rotten_tomatoes", "samsum")),
    "t5xl-flan.toml": ("flan", 166, ("samsum", "web_questions", "niv2_irony_detection")),
}
DTYPE = ["--dtype", "float32"]
FEW = [*DTYPE, "--steps", 2, "--gate-steps", 2, "--batch-size", 4, "--rank", 2, "--eval-every", 1]
SHORT = ["--max-input-tokens", 48, "--max-target-tokens", 16, "--statistics-examples", 4]

each_of_the_papers = pytest.mark.parametrize("name", sorted(THE_PAPERS))


def test_every_recipe_is_valid():
    for path in RECIPES.glob("*.toml"):
        assert read_recipe(path).keys() <= {*ABOVE_TABLES, *RECIPE_TABLES}


# Embeddings are made on request, since they need an extra; inputs keep their question; readings
# are for routers that the paper doesn't have. The default router is what base and experts allow.
# Prompts are embedded as they are served, without the answer choices.
OWN_DEFAULTS = {"embeddings", "embedding_form", "truncation", "readings", "router"}
# What our defaults, for usual bases and batches, are not.
THE_PAPERS_NUMBERS = {"alpha": 1.0, "batch_size": 1024, "learning_rate": 5e-3}


@each_of_the_papers
def test_the_papers_recipes_write_out_the_papers_settings(name):
    recipe = read_recipe(RECIPES / name)
    suite, count, _ = THE_PAPERS[name]
    assert (recipe["base"], recipe["tasks"]) == (T5_XL, [suite])
    assert len(open_tasks(recipe["tasks"])) == count
    for table, config in RECIPE_TABLES.items():
        for key, value in recipe.get(table, {}).items():
            if key not in OWN_DEFAULTS:
                wanted = THE_PAPERS_NUMBERS.get(key, getattr(config(), key))
                assert wanted == value, f"[{table}] {key}"
    assert recipe["formatting"]["truncation"] == "right"
    assert recipe["routing"]["router"] == "phatgoose"
    assert recipe["gates"]["embedding_form"] == "paper"
    written = {key for table in RECIPE_TABLES for key in recipe.get(table, ())}
    assert {*THE_PAPERS_NUMBERS, "rank", "steps", "gate_steps", "max_input_tokens"} <= written


@each_of_the_papers
def test_the_papers_recipes_are_planned_offline(name, phat, tmp_path):
    _, count, _ = THE_PAPERS[name]
    flags = ["--out", tmp_path / "experts", "--dtype", "bfloat16", "--plan"]
    outcome = phat("train", "--recipe", RECIPES / name, *flags)
    assert f"{count} experts to train on {T5_XL}" in outcome.out
    assert "432 sites, 35,389,440 LoRA parameters, 1,032,192 gate" in outcome.out
    assert outcome.out.count("1,000 + 100") == count
    assert f"{count * 1000:,} + {count * 100:,}" in outcome.out
    assert not (tmp_path / "experts").exists()


@each_of_the_papers
def test_the_papers_recipes_run_on_a_tiny_base_and_made_up_data(
    name, phat, tmp_path, monkeypatch, base_folders, hub_copies
):
    monkeypatch.chdir(tmp_path)
    use_toy_embedder(monkeypatch)
    suite, _, names = THE_PAPERS[name]
    for each, few in ((suite, names), ("t0ho", ("rte",))):
        small = Suite(each, tuple(open_suite(each).entry(task) for task in few))
        record = replace(known_suites()[each], open=lambda small=small: small)
        monkeypatch.setitem(known_suites(), each, record)
    content = (RECIPES / name).read_text(encoding="utf-8").replace(T5_XL, str(base_folders["t5"]))
    places = f'data = "{hub_copies.data}"\ntemplates = "{hub_copies.templates}"\n'
    Path(name).write_text(places + content, encoding="utf-8")

    planned = phat("train", "--recipe", name, "--plan", *FEW, *SHORT)
    assert planned.out.count("2 + 2") == len(names)
    assert "≤" not in planned.out
    trained = phat("train", "--recipe", name, *FEW, *SHORT)
    assert (trained.code, trained.err) == (0, "")
    for expert in (Expert.load(Path("experts") / task) for task in names):
        assert expert.info.task["source"] == open_suite(suite).entry(expert.name).source
        assert expert.gates.keys() == expert.means.keys() == expert.lora.keys()
        assert any(gate.any() for gate in expert.gates.values())
        assert len(expert.embeddings) == 4
    methods = ["--methods", "base,merged,average-activation,phatgoose", *DTYPE]
    compared = phat("compare", "experts", "--suite", "t0ho", "--recipe", name, *methods)
    assert (compared.code, compared.err) == (0, "")
    assert "t0ho (1)" in compared.out
