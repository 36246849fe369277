"""The Triton programs as GPUs get them, compiled without one: none spills."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

import phatgoose
from paths import ROOT

COMPILE = ROOT / "tests" / "support" / "compiled_programs.py"
MOST_SHARED = 100 * 1024
MULTIPLYING = {"score_and_choose", "score_experts", "shrink_block", "expand_block"}

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.mark.parametrize(
    ("target", "dtype"), [*itertools.product((80, 90, 100), ("bf16", "fp32")), (90, "fp16")]
)
def test_no_program_spills_and_products_are_the_tensor_cores(target, dtype):
    source = os.path.dirname(os.path.dirname(phatgoose.__file__))
    done = subprocess.run(
        [sys.executable, COMPILE, str(target), dtype, "largest"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": source},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) > 20
    for row in rows:
        assert row["stack"] == 0, row
        assert row["shared"] <= MOST_SHARED, row
        assert row["tensor"] > 0 or row["program"] not in MULTIPLYING, row
