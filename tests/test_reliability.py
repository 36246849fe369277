"""kill -9 at a few moments; benchmarks/reliability.py does it at many (docs/reliability.md)."""

from __future__ import annotations

import json
import subprocess
import sys

from paths import ROOT

SCRIPT = ROOT / "benchmarks" / "reliability.py"
COMMANDS = ("train", "push")


def test_killed_commands_leave_complete_or_absent_results_and_finish_when_given_again(tmp_path):
    counts = tmp_path / "counts.json"
    words = ["--moments", "1", "--only", ",".join(COMMANDS), "--out", str(counts)]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, found in json.loads(counts.read_text()).items():
        assert name in COMMANDS
        assert found["moments"] == found["absent"] + found["complete"] == 1
        assert found["broken"] == found["rerun_failed"] == found["other_result"] == 0
