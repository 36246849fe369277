"""Sequences that wait to be computed; clients take turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .sequences import ActiveSequence

__all__ = ["FairQueue"]


class FairQueue:
    """A queue of sequences for each client.

    The next turn is that of the client served longest ago; each client's own keep their order.
    """

    def __init__(self) -> None:
        self._by_client: dict[str, list[ActiveSequence]] = {}  # in the order of their turns

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def __iter__(self) -> Iterator[ActiveSequence]:
        return (each for own in self._by_client.values() for each in own)

    def count(self, client: str) -> int:
        """How many sequences of `client` wait."""
        return len(self._by_client.get(client, ()))

    def heads(self) -> list[ActiveSequence]:
        """Each client's next sequence, in the order of their turns."""
        return [own[0] for own in self._by_client.values()]

    def add(self, sequences: Sequence[ActiveSequence]) -> None:
        """Append `sequences`, each to its client's queue."""
        for each in sequences:
            self._by_client.setdefault(each.client, []).append(each)

    def take(self, head: ActiveSequence) -> None:
        """Remove `head`, one of `heads`; its client goes to the end of the line."""
        own = self._by_client.pop(head.client)
        if own[1:]:
            self._by_client[head.client] = own[1:]

    def drop_cancelled(self) -> None:
        """Remove cancelled sequences."""
        waiting = [each for each in self if not each.is_cancelled]
        self._by_client = {}
        self.add(waiting)
