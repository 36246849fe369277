"""Fixtures of the tests of experts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from changed_experts import make, vectors_for
from phatgoose.base.identity import BaseReference
from phatgoose.base.loading import load_base
from phatgoose.experts.expert import Expert
from tiny import TINY_BASE, make_adapter


@pytest.fixture(scope="module")
def adapter(base_folders, tmp_path_factory) -> Path:
    base = load_base(base_folders["llama"], dtype="float32")
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "reviews")


@pytest.fixture(scope="module")
def original(adapter, tmp_path_factory) -> Expert:
    expert = make(adapter, means=vectors_for(adapter, 2))
    return expert.save(tmp_path_factory.mktemp("experts") / "reviews")


@pytest.fixture
def write(adapter, tmp_path):
    """A function that writes an expert of a base into the folder `pool`."""

    def expert(name: str, base: BaseReference = TINY_BASE) -> Path:
        saved = Expert.from_peft(adapter, {}, name=name, base=base).save(tmp_path / "pool" / name)
        return saved.directory

    return expert


@pytest.fixture
def own_adapter(adapter, tmp_path) -> Path:
    """A plain adapter of one's own to damage; it names the tiny Llama as its base."""
    return shutil.copytree(adapter, tmp_path / "adapter")


@pytest.fixture
def directory(original, tmp_path) -> Path:
    """An expert directory of one's own to damage."""
    return shutil.copytree(original.directory, tmp_path / "my-expert")
