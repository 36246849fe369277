"""What must be set before anything is imported. Fixtures: tests/support/shared_fixtures.py."""

from __future__ import annotations

import gc
import os

import pytest

# All are read on import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a pool of threads for each tiny base

gc.set_threshold(50_000, 20, 20)  # what is imported and collected is no garbage


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, and with them torch, unless this process only hands tests to others."""
    workers = getattr(config.option, "numprocesses", None)
    if not workers or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("shared_fixtures")


FIRST = ("test_architecture.py",)  # of seconds, and what a change fails often
LONGEST = ("test_core_install.py", "test_demo.py", "test_page.py", "test_loading.py")
LONGEST += ("test_reliability.py", "test_compile.py", "test_recipes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with rules of the house, then with the longest, so that no worker waits at the end.

    `make test` has workers take files in this order (--no-loadscope-reorder).
    """
    place = {name: order for order, name in enumerate(FIRST + LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
