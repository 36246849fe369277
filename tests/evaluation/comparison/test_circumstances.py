"""What a comparison's file says of its making: the commit of our own checkout, of no other's."""

from __future__ import annotations

import os
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from phatgoose.evaluation.comparison import cells as module
from phatgoose.evaluation.comparison.cells import circumstances

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="no git")


def found() -> dict[str, str | None]:
    return circumstances(torch.device("cpu"), Path(__file__))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in a folder of its own."""
    folder = tmp_path / "src" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(module, "PACKAGE", folder)
    return folder


def git(package, *words: str) -> str:
    who = {
        f"GIT_{role}_{what}": "x" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    done = subprocess.run(
        ["git", "-C", package, *words],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **who},
    )
    return done.stdout.strip()


@needs_git
def test_the_commit_is_that_of_the_checkout_and_says_when_files_differ(package):
    git(package, "init", "-q")
    git(package, "add", ".")
    git(package, "commit", "-q", "-m", "first")
    head = git(package, "rev-parse", "--short=9", "HEAD")
    assert found()["commit"] == head
    (package / "__init__.py").write_text("changed = True\n")
    assert found()["commit"] == f"{head}+changes"


@needs_git
def test_a_package_installed_in_somebody_elses_checkout_has_no_commit(package):
    git(package.parent, "init", "-q")
    git(package.parent, "commit", "-q", "--allow-empty", "-m", "theirs")
    assert found()["commit"] is None


def test_without_git_or_a_checkout_there_is_no_commit(package, monkeypatch):
    assert found()["commit"] is None
    monkeypatch.setenv("PATH", "")
    assert found()["commit"] is None


def test_the_machine_is_its_processor_and_the_number_of_cores(tmp_path, monkeypatch):
    processors = tmp_path / "cpuinfo"
    processors.write_text("processor\t: 0\nmodel\t\t: 85\nmodel name\t: A Processor\n" * 2)
    monkeypatch.setattr(module, "PROCESSORS", processors)
    assert found()["machine"] == f"A Processor, {os.cpu_count()} cores"
    processors.unlink()
    machine = found()["machine"]
    assert machine is not None
    assert machine.endswith(" cores")
    assert not machine.startswith(",")


def test_the_date_is_that_of_the_last_finished_cell_in_utc(tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text("{}")
    when = datetime(2026, 11, 26, 10, 0, 5, tzinfo=timezone.utc)
    os.utime(results, (when.timestamp(),) * 2)
    made = circumstances(torch.device("cpu"), results)
    assert made["date"] == "2026-11-26T10:00:05+00:00"
