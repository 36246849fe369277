"""How inputs and targets that are too long are shortened, and how that is counted and told."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

from ..files.strict import one_line

CUTS = ("inputs", "inputs_cut", "inputs_cut_to", "inputs_cut_by")  # in an expert's metrics
WARN_FROM = 0.1  # warn from this share of cut inputs on
HEAD_SHARE = 4  # truncation middle: the head gets a quarter of the room, the tail the rest

T = TypeVar("T")
logger = logging.getLogger(__name__)


def cut_tokens(tokens: Sequence[T], room: int, truncation: str) -> list[T]:
    """At most `room` of the tokens; `truncation` says which part goes (middle, left or right)."""
    if len(tokens) <= room:
        return list(tokens)
    head = {"left": 0, "right": room}.get(truncation, room // HEAD_SHARE)
    return [*tokens[:head], *tokens[len(tokens) - (room - head) :]]


@dataclass(frozen=True)
class Cut:
    """One input or target cut to `most` tokens, which removed `lost` tokens."""

    most: int
    lost: int


@dataclass(frozen=True)
class Cuts:
    """How many of a task's `inputs` were `cut`, to `most` tokens, losing `median` in the median.

    `beyond` counts the inputs that are longer, with their answers, than the `trained` length of a
    base with rotary positions. Such a base accepts them, with unknown quality. `targets` says of
    the inputs' targets what this says of inputs; None where they were not counted.
    """

    inputs: int = 0
    cut: int = 0
    most: int = 0
    median: int = 0
    beyond: int = 0
    trained: int | None = None
    targets: Cuts | None = None

    @classmethod
    def of(
        cls,
        cuts: Sequence[Cut | None],
        lengths: Sequence[int] = (),
        trained: int | None = None,
        *,
        targets: Sequence[Cut | None] = (),
    ) -> Cuts:
        """The summary of `cuts`, None for a whole input; `lengths` are compared with `trained`.

        `targets` are the cuts of their targets.
        """
        found = [cut for cut in cuts if cut is not None]
        beyond = sum(length > trained for length in lengths) if trained is not None else 0
        return cls(
            inputs=len(cuts),
            cut=len(found),
            most=max((cut.most for cut in found), default=0),
            median=round(median(cut.lost for cut in found)) if found else 0,
            beyond=beyond,
            trained=trained,
            targets=cls.of(targets) if targets else None,
        )

    @property
    def share(self) -> float:
        return self.cut / self.inputs if self.inputs else 0.0

    def text(self, what: str = "input") -> str:
        """In words: "12 of 400 inputs (3 %) cut to 512 tokens, by 87 in the median"."""
        return (
            f"{self.cut} of {self.inputs} {what}{'' if self.inputs == 1 else 's'} "
            f"({_percent(self.share)}) cut to {self.most} tokens, by {self.median} in the median"
        )

    def report(self, task: str) -> None:
        """Log the cuts of `task` in one line, or warn from a tenth of its inputs on.

        Always warns of cut targets, whose end is never learnt or scored, and of inputs beyond the
        trained length of the base.
        """
        if self.cut and self.share < WARN_FROM:
            logger.info("%s: %s", one_line(task), self.text())
        elif self.cut:
            warnings.warn(f"{one_line(task)}: {self.text()}.", stacklevel=2)
        if self.targets is not None and self.targets.cut:
            warnings.warn(f"{one_line(task)}: {self.targets.text('target')}.", stacklevel=2)
        if self.beyond:
            warnings.warn(
                f"{one_line(task)}: {self.beyond} of {self.inputs} inputs and their answers are "
                f"longer than the {self.trained} tokens that the base was trained for; lower "
                f"max_input_tokens, or max_new_tokens where answers are generated.",
                stacklevel=2,
            )

    def record(self) -> dict[str, int]:
        """The counts that an expert records among its metrics, by the names in CUTS."""
        values = (self.inputs, self.cut, self.most, self.median)
        return dict(zip(CUTS, values if self.cut else values[:2], strict=False))


def recorded_share(metrics: Mapping[str, Any]) -> str | None:
    """The share of cut inputs in an expert's metrics, in words; None if not recorded."""
    inputs, cut = (metrics.get(name) for name in CUTS[:2])
    if type(inputs) is not int or type(cut) is not int or not 0 <= cut <= inputs or not inputs:
        return None
    return _percent(cut / inputs)


def _percent(share: float) -> str:
    return "under 1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"
