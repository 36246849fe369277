"""The FLAN suite: its list, and the division of prompted rows into training and validation."""

import numpy as np
import pytest

from phatgoose.tasks.suites import flan as suites_flan
from phatgoose.tasks.suites.flan import flan
from phatgoose.tasks.suites.t0 import t0_held_in
from phatgoose.tasks.task import Example, Sources
from suite_data import save_copy

pytestmark = pytest.mark.usefixtures("private_cache")

REPOSITORY = "r-three/Phatgoose_flanv2_offline"
IRONY = "FLANV2/NIV2/Irony Detection"


def row(number: int, kind: str | None = "zs_noopt") -> dict[str, str | None]:
    return {"inputs": f"Q{number}", "targets": f"A{number}", "_template_type": kind, "_task": "t"}


def irony(folder, rows):
    save_copy(folder, REPOSITORY, IRONY, train=rows)
    return flan().entry("niv2_irony_detection").read(Sources(folder))


def test_the_suite_has_the_papers_166_datasets_in_its_order():
    suite = flan()
    assert len(suite.names) == len(set(suite.names)) == 166
    assert suite.names[:36] == t0_held_in().names
    families = [name.split("_")[0] for name in suite.names]
    assert families[36:72] == ["flan2021"] * 36
    assert families[72:147] == ["niv2"] * 75
    added = "wsc copa hellaswag wic race_high race_middle web_questions"
    assert " ".join(suite.names[147:154]) == added
    assert families[154:] == ["dialog"] * 4 + ["flan2021"] * 8
    race, questions = suite.entry("race_high"), suite.entry("web_questions")
    assert (race.metrics, race.max_new_tokens) == (("accuracy",), None)
    assert race.train_examples == 62445 * 8
    assert (questions.metrics, questions.max_new_tokens) == (("rouge-l",), 31)
    assert all(entry.train_examples for entry in suite.entries[147:154])


def test_only_zero_shot_rows_with_input_and_target_are_kept_as_they_are(tmp_path):
    kinds = ["zs_opt", "fs_opt", "zs_noopt", "fs_noopt", None]
    rows = [row(i, kind) for i, kind in enumerate(kinds)]
    rows += [{**row(5), "inputs": " \n"}, {**row(6), "targets": ""}, {**row(7), "targets": None}]
    rows += [{**row(0), "inputs": " Is this\nirony? ", "targets": "no "}]
    task = irony(tmp_path, rows)
    wanted = {Example("Q0", "A0"), Example("Q2", "A2"), Example(" Is this\nirony? ", "no ")}
    assert set(task.train) == wanted
    assert (task.metrics, task.max_new_tokens) == (("rouge-l",), 3)
    assert (task.validation, task.test) == ((), ())  # a tenth of three is none


def test_the_division_is_that_of_the_papers_code(tmp_path, monkeypatch):
    task = irony(tmp_path / "small", [row(i) for i in range(57)])
    order = np.random.RandomState(1234).choice(57, size=57, replace=False)  # its src/data/flat.py
    assert [example.input for example in task.validation] == [f"Q{i}" for i in order[:5]]
    assert [example.input for example in task.train] == [f"Q{i}" for i in order[5:]]
    assert task.validation_origin == "5 of 57 examples, seed 1234"
    monkeypatch.setattr(suites_flan, "VALIDATION_MOST", 3)  # as if the dataset was large
    monkeypatch.setattr(suites_flan, "TRAIN_MOST", 20)
    task = irony(tmp_path / "large", [row(i) for i in range(57)])
    drawn = np.random.default_rng(42).choice(54, size=20, replace=False)
    assert [example.input for example in task.validation] == [f"Q{i}" for i in order[:3]]
    assert [example.input for example in task.train] == [f"Q{i}" for i in order[3:][drawn]]
