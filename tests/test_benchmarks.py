"""The benchmarks in their smoke sizes: every row is measured, told and written down."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra 'harness'")

RUN = Path(__file__).parent.parent / "benchmarks" / "run.py"
ROWS = {
    "prefill": 3,
    "linear": 4,
    "decoding": 2,
    "reference": 1,
    "arrow": 4,
    "ranking": 2,
    "reading": 4,
    "training": 1,
    "gates": 1,
    "growth": 3,
}
FLOORLESS = ("memory", "packed")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    quiet = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(RUN), "--threads", "1", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **quiet}, check=False
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict], Path]:
    """Table, written rows and folder of one run of everything."""
    folder = tmp_path_factory.mktemp("benchmarks")
    done = run("--smoke", "--rounds", "1", "--pools", str(folder / "pools"), "--out", str(folder))
    assert done.returncode == 0, done.stderr
    (written,) = folder.glob("*-smoke.json")
    return done.stdout, json.loads(written.read_text(encoding="utf-8")), folder


def test_every_row_of_the_table_is_measured(smoke):
    _, rows, _ = smoke
    assert {name: len(row["findings"]) for name, row in rows.items()} == ROWS
    for name, row in rows.items():
        for finding in row["findings"]:
            assert math.isfinite(finding["measured"]), finding
            assert name == "growth" or finding["measured"] > 0, finding


def test_every_row_says_where_it_was_measured_and_has_a_floor_where_there_is_one(smoke):
    _, rows, _ = smoke
    for row in rows.values():
        assert {"commit", "cpu", "cores", "threads", "date", "torch", "peft"} <= row.keys()
        assert row["threads"] == 1
        for finding in row["findings"]:
            floorless = any(word in finding["case"] for word in FLOORLESS)
            assert floorless or finding["floor"] is not None, finding


def test_the_table_shows_all_of_it_and_that_tiny_sizes_mean_nothing(smoke):
    printed, rows, _ = smoke
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + sum(ROWS.values())
    for row in rows.values():
        assert all(any(f["case"] in line for line in lines) for f in row["findings"])
    assert "mean nothing" in printed


def test_growth_is_drawn(smoke):
    *_, folder = smoke
    (figure,) = folder.glob("*-growth.png")
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_prompt_of_choices_is_computed_once(smoke):
    _, rows, _ = smoke
    details = rows["ranking"]["findings"][0]["details"]
    assert details["computed"] < details["hflm"]


def test_the_arithmetic_floors_are_those_of_the_issue(monkeypatch):
    monkeypatch.syspath_prepend(str(RUN.parent))
    from floors import Work
    from phatgoose.bases import load_skeleton
    from phatgoose.shapes import KNOWN_BASES

    work = Work.of(load_skeleton(KNOWN_BASES["smollm2"]), rank=16)
    floors = [1 + work.routed(experts, k=2) / work.base() for experts in (36, 166)]
    assert floors == pytest.approx([1.14, 1.32], abs=0.01)


def test_an_unknown_row_is_refused_by_name():
    done = run("--rows", "prefill,nothing")
    assert done.returncode == 2
    assert "no row 'nothing'; there are prefill" in done.stderr
