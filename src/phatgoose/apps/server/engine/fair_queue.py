"""The queue: rows that wait to be computed, of clients who take turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .model_runner import ModelRunner
from .sequences import ActiveSequence

__all__ = ["FairQueue", "QueuedSequence"]


@dataclass(frozen=True)
class QueuedSequence:
    """A row in the queue and the model that is to answer."""

    runner: ModelRunner
    row: ActiveSequence


class FairQueue:
    """Rows by client. Whoever was served goes behind all others; each one's rows stay in order."""

    def __init__(self) -> None:
        self._of: dict[str, list[QueuedSequence]] = {}  # by client, whose turn it is first

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[QueuedSequence]:
        """All rows."""
        return (each for rows in self._of.values() for each in rows)

    def of(self, client: str) -> int:
        """How many rows of `client` wait."""
        return len(self._of.get(client, ()))

    def heads(self) -> list[QueuedSequence]:
        """The next row of each client, in the order of their turns."""
        return [rows[0] for rows in self._of.values()]

    def add(self, waiting: Sequence[QueuedSequence]) -> None:
        """Queue rows up."""
        for each in waiting:
            self._of.setdefault(each.row.client, []).append(each)

    def take(self, head: QueuedSequence) -> None:
        """Let `head`, one of `heads`, go; its client goes behind the others."""
        rows = self._of.pop(head.row.client)
        if rows[1:]:
            self._of[head.row.client] = rows[1:]

    def drop_cancelled(self) -> None:
        """Forget rows that nobody waits for any more."""
        kept = {
            client: [each for each in rows if not each.row.is_cancelled]
            for client, rows in self._of.items()
        }
        self._of = {client: rows for client, rows in kept.items() if rows}
