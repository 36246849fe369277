"""Fixtures of the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from phatgoose.base import load_base
from phatgoose.experts.expert import Expert
from training_runs import train


@pytest.fixture(scope="session")
def whole(base_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Expert:
    """The expert of an uninterrupted training of the tiny Llama."""
    base = load_base(base_folders["llama"], dtype="float32")
    return train(base, tmp_path_factory.mktemp("whole") / "whole")
