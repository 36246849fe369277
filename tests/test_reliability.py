"""kill -9 at a few moments; benchmarks/reliability.py does it at many (docs/reliability.md)."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import constants

from paths import ROOT
from programs import run_program

SCRIPT = ROOT / "benchmarks" / "reliability.py"
COMMANDS = ("train", "push")
HUB = ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_commands_leave_complete_or_absent_results_and_finish_when_given_again(
    tmp_path, monkeypatch, capfd
):
    for name in (*HUB, "HF_HUB_CACHE"):  # the program sets them
        monkeypatch.setattr(constants, name, getattr(constants, name))
    counts = tmp_path / "counts.json"
    only = ("--only", ",".join(COMMANDS))
    code = run_program(SCRIPT, "--moments", 1, *only, "--out", counts)
    assert code == 0, capfd.readouterr()
    for name, found in json.loads(counts.read_text()).items():
        assert name in COMMANDS
        assert found["moments"] == found["absent"] + found["complete"] == 1
        assert found["broken"] == found["rerun_failed"] == found["other_result"] == 0
