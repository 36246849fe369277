"""Fixtures of the tests of suites."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two small task files."""
    path = tmp_path / "mine"
    path.mkdir()
    rows = [
        {"input": "Is it?", "target": "yes", "choices": ["yes", "no"], "split": "test"},
        {"input": "Was it?", "target": "no", "split": "validation"},
        {"input": "Will it?", "target": "no", "references": ["no", "never"]},
    ]
    (path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (path / "a.csv").write_text("input,target,split\n1+1,2,test\n", encoding="utf-8")
    (path / "notes.txt").write_text("not a task", encoding="utf-8")
    return path


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    """Nothing that the library `datasets` writes stays behind, and it shows no progress bars."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
