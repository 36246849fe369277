"""Fixtures of the tests of saved models."""

from __future__ import annotations

from pathlib import Path

import pytest

from growth_cases import composed
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.saved.save import save


@pytest.fixture
def saved(llama, llama_pool, tmp_path) -> Path:
    """A folder with the routed tiny Llama."""
    save(compose(llama_pool, llama, router="phatgoose"), tmp_path / "routed")
    detach(llama.model)
    return tmp_path / "routed"


@pytest.fixture
def pair(llama, uneven, tmp_path) -> Path:
    """A folder of e0 and e1 under router phatgoose."""
    save(composed("phatgoose", uneven.select(["e0", "e1"]), llama), tmp_path / "pair")
    return tmp_path / "pair"
