"""The report: machine and commit, the table, and the JSON file that keeps all of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from findings import ROWS, Finding

PROJECT = Path(__file__).parents[1]
LIBRARIES = ("torch", "transformers", "peft", "lm_eval")
HEAD = ("what", "measured", "")


def circumstances() -> dict[str, Any]:
    """The machine, the commit and the libraries that numbers belong to."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit_of(PROJECT) or "unknown",
        "cpu": _chip(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def commit_of(folder: Path) -> str | None:
    """The commit of the checkout of `folder`, with "+changes" if its files differ."""
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ".")
    head = _git(folder, "rev-parse", "--short=9", "HEAD")
    return f"{head}+changes" if head and changed else head


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() or None


def _chip() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = (line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line)
    return next(names, "") or platform.processor() or platform.machine()


def table(found: Mapping[str, Sequence[Finding]], where: Mapping[str, Any]) -> str:
    """The findings as a Markdown table, with a line about where they come from under it."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in _cells(found)]
    lines += [
        "",
        f"{where['cpu']} ({where['capability']}), {where['cores']} cores, {where['threads']} "
        f"threads, {where['dtype']}; commit {where['commit']}, {where['date'][:10]}; "
        f"torch {where['torch']}, transformers {where['transformers']}, PEFT {where['peft']}, "
        f"lm-eval {where['lm_eval']}. In brackets the lowest and highest of a round.",
    ]
    return "\n".join(lines)


def write_json(
    path: Path, found: Mapping[str, Sequence[Finding]], where: Mapping[str, Any]
) -> None:
    """Write the findings of each row with their circumstances.

    Rows that an earlier run left in the file and that are not among `found` stay there.
    """
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, findings in found.items():
        rows[name] = {**where, "findings": [asdict(finding) for finding in findings]}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _cells(found: Mapping[str, Sequence[Finding]]) -> Iterator[tuple[str, ...]]:
    for name, findings in found.items():
        for finding in findings:
            spread = "–".join(map(_number, finding.spread or ()))
            measured = f"{_number(finding.measured)}{finding.unit}"
            yield (
                f"{ROWS[name].title}: {finding.case}",
                f"{measured} ({spread})" if spread else measured,
                finding.note,
            )


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
