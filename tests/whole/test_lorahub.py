"""examples/lorahub.py and its recipe, on a tiny T5 with adapters of LoraHub's layout.

The adapters are as LoraHub's repositories have them: rank 16 at q and v, pickled, with the config
that PEFT wrote in 2023. The data are JSON lines, named after tasks and versions.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paths import ROOT
from phatgoose.experts.adapter_files import ADAPTER_WEIGHTS
from phatgoose.experts.pool import Pool
from tiny import make_adapter

BASE = "google/flan-t5-large"
RECIPE = (ROOT / "recipes" / "lorahub-flan.toml").read_text(encoding="utf-8")
FILES = {  # of adapters: the file of their data
    "glue_sst2": "glue_sst2:2.0.0.json",
    "super_glue_wsc.fixed": "super_glue_wsc.fixed:1.0.2.json",
    "wiqa_effect_with_label_answer": "wiqa_effect_with_label_answer.json",
}
FEW = ["--gate-steps", 2, "--batch-size", 4, "--max-input-tokens", 48, "--statistics-examples", 8]
OF_2023 = {
    "base_model_name_or_path": BASE,
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 16,
    "target_modules": ["q", "v"],
    "task_type": "SEQ_2_SEQ_LM",
}


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("lorahub", ROOT / "examples" / "lorahub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def published(loaded_bases, tmp_path, monkeypatch) -> Path:
    """A folder with names.txt, adapters, flanv2 and a suite in place of BIG-bench Hard."""
    monkeypatch.chdir(tmp_path)
    for seed, (name, file) in enumerate(FILES.items()):
        folder = tmp_path / "adapters" / name
        make_adapter(
            loaded_bases["t5"], folder, rank=16, seed=seed, lora_alpha=32, target_modules=["q", "v"]
        )
        torch.save(load_file(folder / ADAPTER_WEIGHTS), folder / "adapter_model.bin")
        (folder / ADAPTER_WEIGHTS).unlink()
        (folder / "adapter_config.json").write_text(json.dumps(OF_2023))
        rows = [{"inputs": f"{name} {i}: good?", "targets": f"yes {i}"} for i in range(12)]
        write_lines(tmp_path / "flanv2" / file, [*rows, {"inputs": " ", "targets": "no"}])
    (tmp_path / "names.txt").write_text("\n".join(FILES))
    questions = [("Is 2 even?\nAnswer:", "True"), ("Is 3 even?\nAnswer:", "False")]
    choices = ["True", "False"]
    rows = [{"input": text, "target": target, "choices": choices} for text, target in questions]
    write_lines(tmp_path / "hard" / "boolean.jsonl", rows)
    return tmp_path


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepared(script, *more):
    words = ["--names", "names.txt", "--adapters", "adapters", "--data", "flanv2", "--out", "ready"]
    return script.main([*words, *more])


def test_the_recipe_runs_on_a_stand_in(script, published, phat, base_folders):
    assert prepared(script) == 0
    assert len(Path("ready/tasks/glue_sst2.jsonl").read_text().splitlines()) == 12
    recipe = RECIPE.replace(BASE, str(base_folders["t5"])).replace("bfloat16", "float32")
    Path("recipe.toml").write_text(recipe, encoding="utf-8")

    imported = phat("import", "ready/adapters", "--base", base_folders["t5"], "--out", "pool")
    assert (imported.code, imported.err) == (0, "")
    for name in FILES:
        task = ["--task", f"ready/tasks/{name}.jsonl", "--recipe", "recipe.toml"]
        gated = phat("gate", f"pool/{name}", *task, *FEW, "--out", f"experts/{name}")
        assert (gated.code, gated.err) == (0, "")
    experts = Pool.open("experts").experts
    assert {expert.name for expert in experts} == FILES.keys()
    for expert in experts:
        assert {site.rsplit(".", 1)[1] for site in expert.lora} == {"q", "v"}
        assert {(len(lora.A), lora.scale) for lora in expert.lora.values()} == {(16, 2.0)}
        assert expert.gates.keys() == expert.means.keys() == expert.lora.keys()
        assert any(gate.any() for gate in expert.gates.values())
        assert expert.prompt_statistics
    methods = "base,merged,arrow,average-activation,phatgoose,discriminant,best-individual,oracle"
    told = ["--methods", methods, "--recipe", "recipe.toml", "--suites", "hard", "--out", "table"]
    compared = phat("compare", "experts", *told)
    assert (compared.code, compared.err) == (0, "")
    for label in ("PHATGOOSE", "Discriminant", "Arrow", "Average Activation", "Oracle"):
        assert label in compared.out


def test_an_adapter_keeps_its_numbers_and_safetensors_are_copied(script, published):
    pickled = published / "adapters" / "glue_sst2" / "adapter_model.bin"
    tensors = torch.load(pickled, weights_only=True)
    other = published / "adapters" / "super_glue_wsc.fixed"
    (other / "adapter_model.bin").unlink()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, other / ADAPTER_WEIGHTS
    )
    assert prepared(script) == 0
    for name in ("glue_sst2", "super_glue_wsc.fixed"):
        written = load_file(Path("ready/adapters") / name / ADAPTER_WEIGHTS)
        assert written.keys() == tensors.keys()
        assert all(torch.equal(written[key], tensors[key]) for key in tensors)


class Runs:
    def __reduce__(self):
        return (Path("ran").touch, ())


def test_a_pickle_that_runs_code_is_refused_and_nothing_is_left(script, published, capsys):
    with open("adapters/glue_sst2/adapter_model.bin", "wb") as file:
        pickle.dump(Runs(), file)
    assert prepared(script) == 2
    assert "adapter_model.bin is no adapter's file of tensors" in capsys.readouterr().err
    assert not Path("ran").exists()
    assert not Path("ready").exists()


def test_a_task_without_data_is_told(script, published, capsys):
    Path("flanv2/glue_sst2:2.0.0.json").unlink()
    assert prepared(script) == 2
    told = capsys.readouterr().err
    assert told == "flanv2 has 0 files glue_sst2.json or glue_sst2:VERSION.json, not 1.\n"


def test_rows_are_drawn_by_a_seed(script, published):
    assert prepared(script, "--most", "3") == 0
    rows = Path("ready/tasks/glue_sst2.jsonl").read_text().splitlines()
    assert len(rows) == len(set(rows)) == 3
    assert set(json.loads(rows[0])) == {"input", "target"}
