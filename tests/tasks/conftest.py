"""Fixtures of the tests of suites."""

import pytest


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    """Nothing that the library `datasets` writes stays behind, and it shows no progress bars."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
