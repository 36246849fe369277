"""The processes that train one expert together, as `accelerate launch` or torchrun start them.

Each takes its share of every batch; the first alone writes, and the others wait for it. A process
that was started alone is the first of one.
"""

from __future__ import annotations

import os

import torch
from accelerate import PartialState

__all__ = ["count", "is_first", "join", "rank", "wait_for_all"]


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_first() -> bool:
    """True in the process that writes."""
    return rank() == 0


def join() -> None:
    """Connect with the others, and make this process's own GPU the current one. Twice is fine."""
    if count() > 1:
        _state()


def wait_for_all() -> None:
    """Come back when all processes have called this."""
    if count() > 1:
        _state().wait_for_everyone()


def _state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())
