"""Fixtures of the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from phatgoose.base import load_base
from phatgoose.experts.expert import Expert
from phatgoose.training.pool_jobs import ExpertJob
from training_jobs import job_in
from training_runs import train


@pytest.fixture
def job(tmp_path: Path) -> ExpertJob:
    """`job_in` a folder of one's own."""
    return job_in(tmp_path)


@pytest.fixture(scope="session")
def whole(base_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Expert:
    """The expert of an uninterrupted training of the tiny Llama."""
    base = load_base(base_folders["llama"], dtype="float32")
    return train(base, tmp_path_factory.mktemp("whole") / "whole")
