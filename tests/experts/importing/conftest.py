"""Fixtures of the tests of imports."""

from __future__ import annotations

from pathlib import Path

import pytest

from phatgoose.base import Base
from tiny import make_adapter


@pytest.fixture
def adapter(llama: Base, tmp_path: Path) -> Path:
    """A plain adapter of rank 4 that names the tiny Llama as its base."""
    return make_adapter(llama, tmp_path / "adapter")
