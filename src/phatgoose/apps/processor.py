"""Threads: they soon sleep while they wait, and there are no more than the process may use.

Both are read when torch is loaded, so the command sets them before.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

# Threads of GNU's OpenMP spin for long by default: beside another busy process a product waits for
# a thread that isn't running. Sleeping at once costs a quarter of the speed alone
# (docs/performance.md).
SPINS = "20000"  # some tens of microseconds
CGROUP = Path("/sys/fs/cgroup/cpu.max")


def set_threads(group: Path = CGROUP) -> None:
    """Set how long OpenMP's threads spin and, under a quota, their number, unless the user has.

    The quota is that of a control `group`.
    """
    bound_spinning()
    # torch starts a thread for every core of the machine, whatever a container may use.
    cores = quota(group)
    if cores is not None and cores < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def bound_spinning() -> None:
    """Let OpenMP threads spin less while they wait, unless the user has said how long."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def quota(group: Path) -> int | None:
    """Cores that the control group grants, rounded up; None where it sets no limit."""
    try:
        most, period = group.read_text(encoding="ascii").split()
        return None if most == "max" else max(1, math.ceil(int(most) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # other systems, or an unknown form
        return None
