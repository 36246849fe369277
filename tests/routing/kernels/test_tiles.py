"""The native kernel with AMX's tiles, which tests/support/tiles.cpp stands in for where need be."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phatgoose.routing.kernels.shipped import PROCESSORS

STAND_IN = Path(__file__).parents[2] / "support" / "tiles.cpp"
ABOUT_SCORES = "formula or alone or one_native_call"
TESTED_AGAIN = f"""
import ctypes, pytest, sys
code = pytest.main(["-q", "-p", "no:faulthandler", "-p", "no:cacheprovider", "-k", {ABOUT_SCORES!r},
                    {str(Path(__file__).with_name("test_kernels.py"))!r}])
if len(sys.argv) > 1:
    print("carried out:", ctypes.CDLL(None).tile_instructions())
sys.exit(code)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("c++") is None,
    reason="tiles are x86-64's, and asked of Linux; needs a C++ compiler",
)
def test_tiles_choose_as_the_formula_and_alone_as_among_others(tmp_path):
    flags = "-mamx-tile -mamx-bf16"
    settings = os.environ | {"PHATGOOSE_NATIVE": "compile", "PHATGOOSE_NATIVE_FLAGS": flags}
    command = [sys.executable, "-c", TESTED_AGAIN]
    if is_stood_in_for := "amx_bf16" not in PROCESSORS.read_text():
        library = tmp_path / "tiles.so"
        options = ("-std=c++17", "-O2", "-shared", "-fPIC", "-o", library)
        subprocess.run(["c++", *options, STAND_IN, "-ldl"], check=True)
        settings["LD_PRELOAD"] = str(library)
        command.append("count")
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    if is_stood_in_for:
        assert int(done.stdout.rpartition("carried out: ")[2]) > 10_000
