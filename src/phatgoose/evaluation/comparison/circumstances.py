"""When, by which commit and on what machine a comparison was made: what its file says of itself."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

__all__ = ["chip_of", "circumstances", "commit_of"]

PACKAGE = Path(__file__).parents[2]
PROCESSORS = Path("/proc/cpuinfo")
SECONDS = 20  # for git
DIGITS = 9  # of a commit


def circumstances(device: torch.device, results: Path) -> dict[str, str | None]:
    """`date`, `commit` and `machine` of a comparison on `device`, whose cells are in `results`.

    The date, UTC, is that of the last finished cell. The commit is that of this package, None where
    it is installed. The machine is its GPU or its processor, and the number of cores; workers
    elsewhere may have other ones.
    """
    finished = datetime.fromtimestamp(results.stat().st_mtime, timezone.utc)
    return {
        "date": finished.isoformat(timespec="seconds"),
        "commit": commit_of(PACKAGE),
        "machine": f"{chip_of(device)}, {os.cpu_count()} cores",
    }


def commit_of(folder: Path) -> str | None:
    """The commit of the checkout that `folder` is part of, with "+changes" where its files differ.

    None where it is part of none, or there is no git.
    """
    if not _git(folder, "ls-files", "."):  # no checkout, or one of somebody else's
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ".")
    head = _git(folder, "rev-parse", f"--short={DIGITS}", "HEAD")
    return f"{head}+changes" if head and changed else head


def _git(folder: Path, *words: str) -> str | None:
    """What git says of `folder`, None where it says nothing or there is no git."""
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run(
            [git, "-C", str(folder), *words], capture_output=True, timeout=SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() or None


def chip_of(device: torch.device) -> str:
    """The name of the GPU that `device` is, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = PROCESSORS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = (line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line)
    return next(names, "") or platform.processor() or platform.machine()
