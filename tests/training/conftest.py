"""Fixtures of the tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phatgoose.base.loading import load_base
from phatgoose.experts.expert import Expert
from phatgoose.tasks.suites.training_tasks import open_tasks
from phatgoose.training.pool_jobs import ExpertJob
from training_jobs import GATES, TRAINING
from training_runs import train


@pytest.fixture
def job(tmp_path: Path) -> ExpertJob:
    """The training of one expert on twelve rows of a file."""
    rows = [{"input": f"Number {i}:", "target": ("yes", "no")[i % 2]} for i in range(12)]
    file = tmp_path / "numbers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = open_tasks([str(file)])
    return ExpertJob(task, TRAINING, GATES)


@pytest.fixture(scope="session")
def whole(base_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Expert:
    """The expert of an uninterrupted training of the tiny Llama."""
    base = load_base(base_folders["llama"], dtype="float32")
    return train(base, tmp_path_factory.mktemp("whole") / "whole")
