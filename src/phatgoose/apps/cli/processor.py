"""The processor: threads that soon sleep while they wait, and no more than the process may use.

Both are read when torch is loaded, so they are set before. Threads of GNU's OpenMP spin for long by
default: beside another busy process a product then waits for a thread that isn't running, and takes
many times as long. Sleeping at once would cost a quarter of the speed alone (docs/performance.md).
torch doesn't know a container's quota and starts a thread for every core of the machine.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["quota", "set_threads"]

SPINS = "20000"  # some tens of microseconds
CGROUP_2 = Path("/sys/fs/cgroup/cpu.max")
CGROUP_1 = (
    Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
    Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)


def set_threads() -> None:
    """Set how long OpenMP's threads spin and, under a quota, their number.

    What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    cores = quota()
    if cores is not None and cores < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def quota() -> int | None:
    """The cores that the process's control group may use, rounded up; None without a limit."""
    try:
        if CGROUP_2.is_file():
            most, period = CGROUP_2.read_text(encoding="ascii").split()
        else:
            most, period = (path.read_text(encoding="ascii").strip() for path in CGROUP_1)
        return None if most in ("max", "-1") else max(1, math.ceil(int(most) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # other systems, or an unknown form
        return None
