"""A run: what it is told by, and what of an earlier one is kept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tqdm import tqdm

from other_encoders import make_other
from phatgoose.base.fingerprint import fingerprint
from phatgoose.base.loading import Base, load_base
from phatgoose.config import IA3
from phatgoose.errors import BaseModelError, ConfigError, ExpertError, RoutingError, TaskError
from phatgoose.training.trainer import TrainingCallback
from training_runs import (
    GATES,
    LORA,
    PASS,
    TASK,
    TRAINING,
    assert_same_expert,
    interrupt,
    interrupted,
    on_call,
    train,
    words,
)


@pytest.mark.parametrize(
    ("task", "complaint"),
    [("nosuch.jsonl", "does not exist"), (5, "not 5"), ([TASK], "not \\[<Task")],
)
def test_what_names_no_task_is_refused(llama, tmp_path, task, complaint):
    with pytest.raises(TaskError, match=complaint):
        train(llama, tmp_path / "new", task=task)


@pytest.mark.parametrize("name", ["peft", "training", "gate_training", "formatting"])
def test_what_is_no_settings_is_refused(llama, tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name} is 'lora', but must be settings of class"):
        train(llama, tmp_path / "new", **{name: "lora"})


def test_what_names_no_base_is_refused(llama, tmp_path):
    with pytest.raises(BaseModelError, match="base is a LlamaForCausalLM; wanted its name"):
        train(llama.model, tmp_path / "new")


def test_a_task_in_a_file_and_a_base_in_a_folder_are_read(base_folders, tmp_path):
    rows = [json.dumps({"input": e.input, "target": e.target}) for e in TASK.train]
    (tmp_path / "echo.jsonl").write_text("\n".join(rows))
    expert = train(base_folders["llama"], tmp_path / "new", task=tmp_path / "echo.jsonl")
    assert expert.info.task["source"] == "echo.jsonl"


@pytest.mark.parametrize(
    "other",
    [
        {"peft": replace(LORA, rank=3)},
        {"training": replace(TRAINING, learning_rate=0.5)},
        {"gate_training": replace(GATES, gate_steps=3)},
        {"task": replace(TASK, train=words("quite", "other", "data"))},
    ],
    ids=["lora", "training", "gates", "data"],
)
def test_work_with_other_settings_or_data_is_not_resumed(llama, tmp_path, monkeypatch, other):
    interrupted(monkeypatch, llama, tmp_path / "cut", PASS, call=8)
    with pytest.raises(ConfigError, match="other settings, data or another base"):
        train(llama, tmp_path / "cut", resume=True, **other)


def test_work_on_another_base_is_not_resumed(llama, base_folders, tmp_path, monkeypatch):
    interrupted(monkeypatch, llama, tmp_path / "cut", PASS, call=8)
    with pytest.raises(ConfigError, match="another base"):
        train(load_base(base_folders["qwen2"], dtype="float32"), tmp_path / "cut", resume=True)


def test_resuming_a_finished_run_loads_it(llama, monkeypatch, whole):
    monkeypatch.setattr(*on_call(PASS, 1, interrupt))
    assert_same_expert(train(llama, whole.directory, resume=True), whole)


def test_an_existing_place_is_refused(llama, tmp_path):
    (tmp_path / "echo").mkdir()
    with pytest.raises(ExpertError, match="exists already"):
        train(llama, tmp_path / "echo")


@pytest.mark.parametrize("architecture", ["led", "prophetnet"])
def test_a_base_that_pads_inside_is_refused_before_the_work(architecture, llama, tmp_path):
    model = make_other(architecture)
    base = Base(model, llama.tokenizer, architecture, None, fingerprint(model))
    with pytest.raises(RoutingError, match=r"pads or transposes .* --no-means"):
        train(base, tmp_path / "echo")
    assert list(tmp_path.iterdir()) == []
    without = replace(GATES, means=False, readings=False)
    assert train(base, tmp_path / "echo", gate_training=without).means == {}


def test_an_embedder_that_cannot_be_loaded_is_told_before_the_work(llama, tmp_path):
    pytest.importorskip("sentence_transformers", reason="needs the extra 'retrieval'")
    wanted = replace(GATES, embeddings=True, embedder=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"Embedder .* can't be loaded"):
        train(llama, tmp_path / "echo", gate_training=wanted)
    assert list(tmp_path.iterdir()) == []


def test_work_is_resumed_for_other_statistics(llama, tmp_path, monkeypatch, whole):
    interrupted(monkeypatch, llama, tmp_path / "echo", PASS, call=8)
    fewer = replace(GATES, readings=False, statistics_examples=2)
    got = train(llama, tmp_path / "echo", resume=True, gate_training=fewer)
    assert_same_expert(got, whole)
    assert not got.readings


def test_work_of_another_dtype_is_not_resumed(llama, base_folders, tmp_path, monkeypatch):
    interrupted(monkeypatch, llama, tmp_path / "cut", PASS, call=8)
    half = load_base(base_folders["llama"], dtype="bfloat16")
    with pytest.raises(ConfigError, match="another base"):
        train(half, tmp_path / "cut", resume=True)


def test_the_best_step_is_kept_where_the_work_moved_before_it_was_saved(llama, tmp_path):
    """The last step is not the best one, and the run ends between that and the saved adapter."""
    task = replace(TASK, validation=words("q", "x", "z"))
    settings = replace(TRAINING, steps=8, learning_rate=0.1, warmup_ratio=0.0)
    wanted = train(llama, tmp_path / "whole" / "echo", task, settings)
    assert wanted.info.metrics["expert_best_step"] < 8
    saved = []

    def stop():
        saved.append(1)
        if len(saved) == 4:
            raise KeyboardInterrupt

    callback = TrainingCallback(on_saved=stop, shows_bar=False)
    with pytest.raises(KeyboardInterrupt):
        train(llama, tmp_path / "first" / "echo", task, settings, callback=callback)
    (tmp_path / "first").rename(tmp_path / "moved")
    got = train(llama, tmp_path / "moved" / "echo", task, settings, resume=True)
    assert_same_expert(got, wanted)
    assert got.info.metrics["expert_best_step"] == wanted.info.metrics["expert_best_step"]


def test_no_bar_is_shown_beside_that_of_a_caller_who_has_one(llama, tmp_path, monkeypatch):
    hidden = []

    def bar(*_, disable, **others):
        hidden.append(disable)
        return tqdm(disable=True, **others)

    for module in ("training.trainer", "tasks.prompt_passes"):
        monkeypatch.setattr(f"phatgoose.{module}.tqdm", bar)
    done = []
    callback = TrainingCallback(on_steps=done.append, shows_bar=False)
    train(llama, tmp_path / "quiet", callback=callback)
    assert sum(done) == TRAINING.steps + GATES.gate_steps
    assert hidden == [True] * 5  # means, rehearsed; expert, gates, readings, means
    train(llama, tmp_path / "own")
    assert hidden[5:] == [True] + [None] * 4


def test_a_finished_expert_of_other_settings_is_kept_and_told(llama, whole):
    with pytest.warns(UserWarning, match=r"kept as it is, with other settings: rank 2, not 3\.$"):
        train(llama, whole.directory, resume=True, peft=replace(LORA, rank=3))
    with pytest.warns(UserWarning, match="gate_steps 2, not 5"):
        train(llama, whole.directory, resume=True, gate_training=replace(GATES, gate_steps=5))
    with pytest.warns(UserWarning, match="peft 'lora', not 'ia3'"):
        train(llama, whole.directory, resume=True, peft=IA3())
    with pytest.warns(UserWarning, match="gate_learning_rate .*, not 0.25"):
        train(llama, whole.directory, resume=True, training=replace(TRAINING, learning_rate=0.25))
    fewer = replace(GATES, statistics_examples=1)  # which `measure` may have changed
    assert_same_expert(train(llama, whole.directory, resume=True, gate_training=fewer), whole)
