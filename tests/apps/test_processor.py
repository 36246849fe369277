"""Threads of the command: they soon sleep while they wait, and keep to a container's quota."""

import os
import subprocess
import sys

import pytest
import torch

from phatgoose.apps import processor
from phatgoose.apps.processor import SPINS, keep_to, quota, set_threads, usable_cores


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Writes a control group's file, of version 2 unless told otherwise."""
    monkeypatch.setattr(processor, "CGROUP_2", tmp_path / "cpu.max")
    older = (tmp_path / "cpu.cfs_quota_us", tmp_path / "cpu.cfs_period_us")
    monkeypatch.setattr(processor, "CGROUP_1", older)

    def write(*texts: str) -> None:
        places = older if len(texts) == 2 else (tmp_path / "cpu.max",)
        for text, path in zip(texts, places, strict=True):
            path.write_text(text + "\n")

    return write


@pytest.mark.parametrize(
    ("texts", "cores"),
    [
        (("max 100000",), None),
        (("200000 100000",), 2),
        (("150000 100000",), 2),  # rounded up
        (("20000 100000",), 1),
        (("-1", "100000"), None),
        (("300000", "100000"), 3),
        (("100000 0",), None),
        (("who knows",), None),
        (("x y",), None),
    ],
)
def test_a_control_groups_quota_is_read_in_cores(group, texts, cores):
    assert quota() is None
    group(*texts)
    assert quota() == cores


@pytest.fixture
def environment(monkeypatch):
    """The variables, unset, and back as they were afterwards."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that what is set is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return os.environ


@pytest.mark.parametrize(
    ("quota", "given", "wanted"),
    [
        ("200000 100000", {}, (SPINS, "2")),
        ("900000 100000", {}, (SPINS, None)),  # more than there are: the number is torch's own
        ("200000 100000", {"OMP_NUM_THREADS": "5"}, (SPINS, "5")),
        ("200000 100000", {"OMP_WAIT_POLICY": "ACTIVE"}, (None, "2")),
    ],
)
def test_threads_are_bounded_unless_the_user_has_set_them(
    group, environment, monkeypatch, quota, given, wanted
):
    group(quota)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    set_threads()
    assert (environment.get("GOMP_SPINCOUNT"), environment.get("OMP_NUM_THREADS")) == wanted
    assert environment.get("OMP_WAIT_POLICY") == given.get("OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    ("affinity", "text", "cores"),
    [({0, 3}, "max 100000", 2), ({0, 1, 2}, "100000 100000", 1), ({5}, "300000 100000", 1)],
)
def test_a_process_may_use_what_affinity_and_quota_leave(group, monkeypatch, affinity, text, cores):
    group(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity, raising=False)
    assert usable_cores() == cores


def test_where_there_is_no_affinity_all_cores_may_be_used(group, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores() == 6


@pytest.mark.parametrize(
    ("given", "had", "usable", "threads"),
    [(1.0, 8, 8, 1), (0.5, 8, 8, 1), (4.0, 8, 8, 4), (4.0, 8, 2, 2), (4.0, 3, 8, 3)],
)
def test_a_worker_keeps_to_the_cores_it_was_given(monkeypatch, given, had, usable, threads):
    told = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: had)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(processor, "usable_cores", lambda: usable)
    assert keep_to(given) == threads
    assert told == [threads]


def test_the_command_line_loads_no_torch_before():
    loads = "import sys, phatgoose.apps.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loads], check=False).returncode == 0
