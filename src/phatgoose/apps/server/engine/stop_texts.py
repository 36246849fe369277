"""Where an answer ends: the texts that its request wants it to stop before."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["earliest", "held_back"]


def earliest(text: str, stops: Sequence[str], begin: int) -> int | None:
    """Where the first of `stops` in `text` begins, searched from `begin` on; None if nowhere."""
    found = [index for stop in stops if (index := text.find(stop, max(0, begin))) >= 0]
    return min(found, default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `stops`."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
