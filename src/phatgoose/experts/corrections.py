"""Corrections: prompts that people gave to the expert of a pool that should have answered them.

They stay in a file in the pool's folder, a line each, where they can be read and taken back. When a
pool's prompts are compared, they count among those of its experts. Not in the paper.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import PoolError
from ..files import parse_json, reading, regular_file, write_text, writing

FILE = "corrections.jsonl"
MOST_BYTES = 1 << 24
_writing = threading.Lock()


@dataclass(frozen=True)
class Correction:
    """A prompt, and the expert that should have answered it."""

    expert: str
    prompt: str

    @property
    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def corrections_in(pool: Path) -> list[Correction]:
    """Those in a pool's folder, first ones first. Raises PoolError for a file that isn't right."""
    path = pool / FILE
    if not path.exists():
        return []
    if regular_file(path, PoolError).stat().st_size > MOST_BYTES:
        raise PoolError(f"{path} has more than {MOST_BYTES} bytes; take some corrections back.")
    corrections = []
    with reading(path, PoolError):
        lines = path.read_text(encoding="utf-8").split("\n")  # a prompt may have other breaks
    for number, line in enumerate(filter(None, lines), start=1):
        with reading(f"{path}, line {number}", PoolError):
            corrections.append(parse_json(line, Correction))
    return corrections


def correct(pool: Path, correction: Correction) -> None:
    """Add one to those of a pool's folder. Raises PoolError for a folder that can't be written."""
    path = pool / FILE
    with _writing, writing(path, PoolError), path.open("a", encoding="utf-8") as file:
        file.write(correction.line)


def take_back(pool: Path, numbers: Collection[int]) -> None:
    """Remove those of these numbers, from 1. Raises PoolError for one that isn't there."""
    with _writing:
        rows = corrections_in(pool)
        for number in numbers:
            if not 1 <= number <= len(rows):
                raise PoolError(f"There is no correction {number}; {pool} has {len(rows)}.")
        kept = [row.line for number, row in enumerate(rows, start=1) if number not in numbers]
        write_text(pool / FILE, "".join(kept), PoolError)
