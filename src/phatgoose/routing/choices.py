"""What is known of some prompts: the experts that act on them, and where those begin to act."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

NOBODY = -1  # stands among experts for none: the base's own output


@dataclass(frozen=True)
class Choice:
    """The experts of some prompts: `experts` [rows, k], the pool's indices, best first.

    `weights` [rows, k], float32, say how much each adds. Most rows have one expert of weight 1.
    Both are [rows, blocks, k] if each block of the model has a choice of its own.
    """

    experts: Tensor
    weights: Tensor

    @classmethod
    def alone(cls, experts: Tensor) -> Choice:
        """Each of `experts` [rows] alone, with the weight 1; NOBODY is the base."""
        return cls(experts[:, None], torch.ones(len(experts), 1, device=experts.device))

    @classmethod
    def joined(cls, parts: Iterable[Choice]) -> Choice:
        """The rows of all `parts`, at least one, in turn; where k differs, NOBODY fills rows up."""
        choices = list(parts)
        k = max((each.experts.shape[-1] for each in choices), default=0)
        rooms = [(each, (0, k - each.experts.shape[-1])) for each in choices]
        experts = [pad(each.experts, room, value=NOBODY) for each, room in rooms]
        return cls(torch.cat(experts), torch.cat([pad(each.weights, room) for each, room in rooms]))

    def lone(self) -> Tensor | None:
        """The expert of each row [rows], where each has one of weight 1; else None."""
        alone = self.experts.shape[1:] == (1,) and bool((self.weights == 1).all())
        return self.experts[:, 0] if alone and bool((self.experts >= 0).all()) else None

    def named(self, names: Sequence[str]) -> list[dict[str, float]]:
        """For each row its experts' weights by name, best first; `names` are the pool's.

        A row of the base alone is empty.
        """
        whole = self.over_blocks()
        rows = zip(whole.experts.tolist(), whole.weights.tolist(), strict=True)
        return [
            {names[z]: weight for z, weight in zip(experts, weights, strict=True) if z >= 0}
            for experts, weights in rows
        ]

    @property
    def key(self) -> str:
        """Equal for equal choices."""
        return str((self.experts.tolist(), self.weights.tolist()))

    def __len__(self) -> int:
        return len(self.experts)

    def at(self, block: int) -> Choice:
        """The choice of one block; of a model with fewer, of the last."""
        if self.experts.dim() == 2:
            return self
        block = min(block, self.experts.shape[1] - 1)
        return Choice(self.experts[:, block], self.weights[:, block])

    def over_blocks(self) -> Choice:
        """One choice [rows, k] for all blocks: the experts of any, by their mean weights."""
        if self.experts.dim() == 2:
            return self
        blocks, chosen = self.experts.shape[1], int(self.experts.max()) + 1
        shares = self.weights.new_zeros(len(self), chosen)
        where = self.experts.flatten(1).clamp(min=0)  # NOBODY has no weight
        shares.scatter_add_(1, where, self.weights.flatten(1) / blocks)
        acting = int((shares > 0).sum(dim=1).max())
        best = shares.sort(dim=1, descending=True, stable=True)
        return Choice(best.indices[:, :acting], best.values[:, :acting])

    def repeated(self, rows: int) -> Choice:
        """The single row, repeated `rows` times."""
        return Choice(self.experts.repeat(rows, 1), self.weights.repeat(rows, 1))

    def of(self, rows: Sequence[int]) -> Choice:
        return Choice(self.experts[list(rows)], self.weights[list(rows)])

    def each(self) -> list[Choice]:
        return [self.of([row]) for row in range(len(self))]


@dataclass(frozen=True)
class PromptRouting:
    """What is known of some prompts: their experts, and where those of `acting` begin in them.

    `choice` is None for routers that choose for every token, `beginnings` [rows, acting] where all
    experts act on all tokens.
    """

    choice: Choice | None = None
    beginnings: Tensor | None = None

    @classmethod
    def joined(cls, parts: Iterable[PromptRouting]) -> PromptRouting:
        held = list(parts)
        choices = [part.choice for part in held if part.choice is not None]
        begin = [part.beginnings for part in held if part.beginnings is not None]
        return cls(Choice.joined(choices) if choices else None, torch.cat(begin) if begin else None)

    def of(self, rows: Sequence[int]) -> PromptRouting:
        choice, begin = self.choice, self.beginnings
        return PromptRouting(
            choice and choice.of(rows), None if begin is None else begin[list(rows)]
        )

    def each(self, rows: int) -> list[PromptRouting]:
        """One for each of its `rows`, which it can't count where nothing is known of them."""
        return [self.of([row]) for row in range(rows)]


class Acting(NamedTuple):
    """Where the experts of a site act in a pass of T tokens.

    `mask` [T, E] says where each does, None for all of them everywhere. If that is at most a half
    of the tokens, `places` are those where any acts, and `mask_there` is the mask at these.
    """

    mask: Tensor | None = None
    places: Tensor | None = None
    mask_there: Tensor | None = None


@dataclass(frozen=True)
class Activity:
    """Where in a pass the experts of `acting` act: `mask` [tokens, 1 + acting].

    Column 0 is that of experts that always act.
    """

    mask: Tensor
    _at: dict[tuple[int, ...], Acting] = field(default_factory=dict, repr=False)

    def at(self, columns: tuple[int, ...]) -> Acting:
        """Where a site's experts act, which have these columns."""
        if columns not in self._at:  # many sites of a pass ask for the same
            mask = self.mask[:, list(columns)]
            if bool(mask.all()):
                self._at[columns] = Acting()
                return self._at[columns]
            places = mask.any(dim=1).nonzero()[:, 0]
            there = mask[places]
            few = 2 * len(places) <= len(mask)
            self._at[columns] = Acting(
                mask, places if few else None, None if bool(there.all()) else there
            )
        return self._at[columns]

    @classmethod
    def of(cls, positions: Tensor, begin: Tensor) -> Activity:
        """Of tokens at `positions` [rows, columns], `begin` [rows or tokens, acting]."""
        rows, columns = positions.shape
        if len(begin) != rows * columns:  # beams repeat rows
            begin = begin.repeat_interleave(rows // len(begin) * columns, dim=0)
        acts = positions.reshape(-1, 1) >= begin.to(positions.device)
        return cls(torch.cat([torch.ones_like(acts[:, :1]), acts], dim=1))
