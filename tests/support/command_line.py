"""Commands run in this process, the files they read, and what they print."""

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from phatgoose.apps.cli import main

GATE_FLAGS = ["--batch-size", "4", "--gate-steps", "2", "--statistics-examples", "4"]
FLAGS = [*GATE_FLAGS, "--steps", "2", "--rank", "2", "--eval-every", "1", "--dtype", "float32"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """The command run in this process, with Python's usual warning filters."""
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for kind in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    return Outcome(int(caught.value.code or 0), streams.out, streams.err)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def review(number: int, **changes: Any) -> dict[str, Any]:
    target = ("good", "bad")[number % 2]
    row = {"input": f"Film {number} is", "target": target, "choices": ["good", "bad"]}
    return {**row, **changes}


def open_row(number: int) -> dict[str, Any]:
    return {"input": f"Count {number}:", "target": str(number)}


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


TRAIN = ["--base", "tiny-base", "--out", "new", *FLAGS]
BASE = ["--base", "tiny-base", "--dtype", "float32"]


def refused(outcome: Outcome, complaint: str, code: int = 2) -> None:
    assert outcome.code == code
    assert re.fullmatch(r"error: [^\n]+\n", outcome.err), outcome.err
    assert complaint in outcome.err
