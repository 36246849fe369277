"""Mixtures: the experts that act on whole inputs, and with which weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .decision import highest

__all__ = ["NOBODY", "Mixtures"]

NOBODY = -1  # stands among experts for none: the base's own output


@dataclass(frozen=True)
class Mixtures:
    """The experts of some inputs: `experts` [rows, k], the pool's indices, best first.

    `weights` [rows, k], float32, say how much each adds. Most rows have one expert of weight 1.
    """

    experts: Tensor
    weights: Tensor

    @classmethod
    def alone(cls, experts: Tensor) -> Mixtures:
        """Each of `experts` [rows] alone, with the weight 1; NOBODY is the base."""
        return cls(experts[:, None], torch.ones(len(experts), 1, device=experts.device))

    @classmethod
    def best(cls, scores: Tensor, k: int, temperature: float) -> Mixtures:
        """The k highest of each row of `scores` [rows, E], softmax of score / temperature.

        `k` is lowered to E. With k = 1 the weight is 1 exactly.
        """
        experts = highest(scores, min(k, scores.shape[-1]))
        weights = (scores.gather(-1, experts).float() / temperature).softmax(dim=-1)
        return cls(experts, weights)

    @classmethod
    def joined(cls, parts: Iterable[Mixtures]) -> Mixtures:
        """The rows of all `parts`, which have the same k, in turn."""
        held = list(parts)
        experts = torch.cat([part.experts for part in held])
        return cls(experts, torch.cat([part.weights for part in held]))

    def lone(self) -> Tensor | None:
        """The expert of each row [rows], where each has one of weight 1; else None."""
        alone = self.experts.shape[1] == 1 and bool((self.weights == 1).all())
        return self.experts[:, 0] if alone and bool((self.experts >= 0).all()) else None

    def __len__(self) -> int:
        return len(self.experts)

    def of(self, rows: Sequence[int]) -> Mixtures:
        """Those of some rows."""
        return Mixtures(self.experts[list(rows)], self.weights[list(rows)])

    def each(self) -> list[Mixtures]:
        """Every row on its own."""
        return [self.of([row]) for row in range(len(self))]

    def shared_out(self, tokens: int) -> Mixtures:
        """A row for each of so many tokens: tokens / rows in turn for each row, which fits."""
        count = tokens // len(self)
        return Mixtures(
            self.experts.repeat_interleave(count, dim=0),
            self.weights.repeat_interleave(count, dim=0),
        )
