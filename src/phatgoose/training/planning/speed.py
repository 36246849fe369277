"""How fast a worker trains, told or measured."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Speed"]


@dataclass(frozen=True)
class Speed:
    """How fast a worker is: tokens a second, without padding, of each kind of work.

    `expert` and `gates` are trained tokens, `forward` those of validation and statistics.
    `start_seconds` go by until its base is loaded. `memory_bytes` is the most that it took; None
    means that it was not measured.
    """

    expert: float
    gates: float
    forward: float
    start_seconds: float = 0.0
    memory_bytes: int | None = None

    @classmethod
    def of(cls, tokens_per_second: float) -> Speed:
        """The speed of a worker that trains so many tokens a second."""
        forward = 2 * tokens_per_second  # the way back costs as much again
        return cls(tokens_per_second, tokens_per_second, forward)

    def told(self) -> str:
        """How it is known, in a sentence."""
        if self.memory_bytes is None:
            return f"Time is at {self.expert:g} trained tokens a second, as given."
        return (
            f"Time is at {self.expert:.0f} tokens a second of an expert, {self.gates:.0f} of gates "
            f"and {self.forward:.0f} of validation and statistics, measured here on a few batches."
        )
