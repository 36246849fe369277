"""Fixtures of the tests of saved models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from phatgoose.config import Routing
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.saved.save import save
from phatgoose.routing.saved.segments import save_pool


@pytest.fixture
def saved(llama, llama_pool, tmp_path) -> Path:
    """A folder with the routed tiny Llama."""
    save(compose(llama_pool, llama, router="phatgoose"), tmp_path / "routed")
    detach(llama.model)
    return tmp_path / "routed"


@pytest.fixture
def packed(llama, uneven, tmp_path) -> Path:
    """A folder of e0 and e1, packed."""
    save_pool(
        uneven.select(["e0", "e1"]),
        tmp_path / "packed",
        copy.deepcopy(llama),
        routing=Routing("phatgoose"),
    )
    return tmp_path / "packed"
