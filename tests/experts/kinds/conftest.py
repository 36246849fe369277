"""Fixtures of the tests of kinds of experts; a module may have another `adapter`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tiny import make_adapter


@pytest.fixture(scope="session")
def plain_adapter(loaded_bases, tmp_path_factory) -> Path:
    return make_adapter(loaded_bases["llama"], tmp_path_factory.mktemp("adapters") / "plain")


@pytest.fixture
def adapter(plain_adapter, tmp_path) -> Path:
    """A plain adapter of one's own to damage."""
    return shutil.copytree(plain_adapter, tmp_path / "my-adapter")
