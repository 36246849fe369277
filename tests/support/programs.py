"""Scripts run in this process, which has imported most of what they import."""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from pathlib import Path

import pytest


def run_program(script: Path, *arguments: object) -> int:
    """The exit status of `script`; what it sets for its whole process is undone afterwards."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        patch.syspath_prepend(str(script.parent))
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(script), run_name="__main__")
    return int(caught.value.code or 0)
