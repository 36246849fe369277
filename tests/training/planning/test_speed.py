"""Speeds: given to a plan, or measured by a short trial."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from phatgoose.errors import TaskError
from phatgoose.tasks.suites.registry import open_tasks
from phatgoose.training.plan import plan_training
from phatgoose.training.plan_costs import STATUS, Speed, measure_speed, most_memory
from phatgoose.training.train_expert import train_expert
from training_jobs import SETTINGS


def test_a_measured_speed_is_used_stage_by_stage(three_tasks, base_folders):
    speed = Speed(100.0, 50.0, 200.0, start_seconds=3.0, memory_bytes=12345)
    plan = plan_training(str(base_folders["llama"]), three_tasks, **SETTINGS, speed=speed)
    task = plan.tasks[0]
    length = task.prompt_tokens + task.target_tokens
    wanted = length * (4 * 20 / 100 + 4 * 5 / 50 + task.measured / 200)
    assert task.seconds == pytest.approx(wanted)
    assert (plan.memory_bytes, plan.start_seconds) == (12345, 3.0)
    assert any("100 tokens a second of an expert, 50 of gates" in note for note in plan.notes)
    assert not any("counted" in note for note in plan.notes)


def test_a_speed_is_measured_on_the_first_task_with_data(three_tasks, base_folders):
    speed = measure_speed(str(base_folders["llama"]), three_tasks, **SETTINGS, dtype="float32")
    rates = (speed.expert, speed.gates, speed.forward, speed.start_seconds)
    assert all(0 < rate < 1e7 for rate in rates)
    assert speed.memory_bytes > 50e6


def test_the_memory_is_that_of_the_longest_micro_batch_of_any_task(
    three_tasks, base_folders, tmp_path, monkeypatch
):
    long = [{"input": "a very " * n + "long text", "target": "yes"} for n in range(9)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    tasks = [*three_tasks, *open_tasks([str(tmp_path / "long.jsonl")])]
    trained = []

    def record(base, task, **settings):
        trained.append((task, settings["training"]))
        return train_expert(base, task, **settings)

    monkeypatch.setattr("phatgoose.training.plan_costs.train_expert", record)
    measure_speed(str(base_folders["llama"]), tasks, **SETTINGS, dtype="float32")
    (_, quick), (longest, once) = trained
    assert (quick.steps, once.steps, once.batch_size) == (6, 1, 2)
    words = [len(row.input.split()) for row in (*longest.train, *longest.validation)]
    assert words == [18, 16, 18, 16, 14, 12]


def test_speed_and_memory_are_measured_with_the_micro_batch_of_each_task(
    three_tasks, base_folders, monkeypatch
):
    tasks = [
        replace(task, entry=replace(task.entry, micro_batch_size=own))
        for task, own in zip(three_tasks, (1, 3, None), strict=True)
    ]
    trained = []

    def record(base, task, **settings):
        training = settings["training"]
        trained.append((task.name, len(task.train), training.batch_size, training.micro_batch_size))
        return train_expert(base, task, **settings)

    monkeypatch.setattr("phatgoose.training.plan_costs.train_expert", record)
    measure_speed(str(base_folders["llama"]), tasks, **SETTINGS, dtype="float32")
    assert trained == [("one", 18, 2, 1), ("two", 3, 3, 3)]  # the third has the settings' two


@pytest.mark.skipif(not STATUS.is_file(), reason="needs Linux's /proc")
def test_a_processs_memory_is_its_own_not_its_parents():
    held = torch.ones(40_000_000)
    code = "from phatgoose.training.plan_costs import most_memory; print(most_memory())"
    started = [sys.executable, "-c", code]
    child = subprocess.run(started, capture_output=True, text=True, check=True, close_fds=False)
    assert 50e6 < int(child.stdout) < most_memory() - held.nbytes / 2


def test_without_data_on_this_machine_no_speed_can_be_measured(base_folders):
    with pytest.raises(TaskError, match="no speed can be measured"):
        measure_speed(str(base_folders["llama"]), open_tasks(["t0hi/trec"]), **SETTINGS)
