"""Threads of the command: they soon sleep while they wait, and keep to a container's quota."""

import os

import pytest

from phatgoose.apps.processor import SPINS, set_threads


@pytest.mark.parametrize(
    ("quota", "environment", "spins", "threads"),
    [
        ("150000 100000", {}, SPINS, "2"),  # rounded up
        ("900000 100000", {}, SPINS, None),  # more than there are: the number is torch's own
        *((text, {}, SPINS, None) for text in (None, "max 100000", "100000 0", "who knows", "x y")),
        ("200000 100000", {"OMP_NUM_THREADS": "5"}, SPINS, "5"),
        ("200000 100000", {"OMP_WAIT_POLICY": "ACTIVE"}, None, "2"),
    ],
)
def test_threads_are_bounded_unless_the_user_has_set_them(
    tmp_path, monkeypatch, quota, environment, spins, threads
):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that what is set is undone
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    set_threads(tmp_path / "cpu.max")
    assert os.environ.get("GOMP_SPINCOUNT") == spins
    assert os.environ.get("OMP_NUM_THREADS") == threads
    assert os.environ.get("OMP_WAIT_POLICY") == environment.get("OMP_WAIT_POLICY")
