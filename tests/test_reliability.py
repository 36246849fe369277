"""kill -9 at a few moments; benchmarks/reliability.py does it at many (research/reliability.md)."""

from __future__ import annotations

import json
import subprocess
import sys

from paths import ROOT

SCRIPT = ROOT / "benchmarks" / "reliability.py"


def test_killed_commands_leave_complete_or_absent_results_and_finish_when_given_again(tmp_path):
    counts = tmp_path / "counts.json"
    words = [sys.executable, str(SCRIPT), "--moments", "1", "--out", str(counts)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = json.loads(counts.read_text())
    assert len(commands) == 7
    for found in commands.values():
        assert found["moments"] == found["absent"] + found["complete"] == 1
        assert found["broken"] == found["rerun_failed"] == found["other_result"] == 0
