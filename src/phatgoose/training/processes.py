"""The processes that train one expert together, started by `accelerate launch` or torchrun.

Each takes its share of every batch. Only the first one writes; the others wait for it. A process
that was started alone is the first of one.
"""

from __future__ import annotations

import os

import torch
from accelerate import PartialState


def count() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_first() -> bool:
    """True in the process that writes."""
    return rank() == 0


def join() -> None:
    """Connect to the others, and make this process's GPU the current one; may be called again."""
    if count() > 1:
        _state()


def wait_for_all() -> None:
    """Return when all processes have called this."""
    if count() > 1:
        _state().wait_for_everyone()


def _state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())
