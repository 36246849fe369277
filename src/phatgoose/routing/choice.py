"""What is chosen for prompts, and who chooses: experts with weights, for each row of a batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from .conversation import ChatTexts

NOBODY = -1  # stands among experts for none: the base's own output
BASE = "base"
BASE_ALONE = {BASE: 1.0}  # is reported where no expert acts


@dataclass(frozen=True)
class Choice:
    """The experts of some prompts: `experts` [rows, k], the pool's indices, best first.

    `weights` [rows, k], float32, say how much each adds. Most rows have one expert of weight 1.
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
        k = max(choice.experts.shape[1] for choice in choices)
        experts = []
        weights = []
        for choice in choices:
            room = (0, k - choice.experts.shape[1])
            experts.append(pad(choice.experts, room, value=NOBODY))
            weights.append(pad(choice.weights, room))
        return cls(torch.cat(experts), torch.cat(weights))

    def named(self, names: Sequence[str]) -> list[dict[str, float]]:
        """For each row its experts' weights by name, best first; `names` are the pool's.

        A row of the base alone is empty.
        """
        rows: list[dict[str, float]] = []
        for experts, weights in zip(self.experts.tolist(), self.weights.tolist(), strict=True):
            pairs = zip(experts, weights, strict=True)
            rows.append({names[z]: weight for z, weight in pairs if z != NOBODY})
        return rows

    @property
    def key(self) -> str:
        """Equal for equal choices."""
        return str((self.experts.tolist(), self.weights.tolist()))

    @property
    def is_one_for_all(self) -> bool:
        """Whether all rows have the same experts with the same weights."""
        experts_agree = (self.experts == self.experts[0]).all()
        return bool(experts_agree and (self.weights == self.weights[0]).all())

    def __len__(self) -> int:
        return len(self.experts)

    def left_to_base(self, mask: Tensor) -> Choice:
        """The same, but nobody acts where the `mask` is True: [rows], or of the experts' shape."""
        mask = mask if mask.dim() > 1 else mask[:, None]
        return Choice(self.experts.masked_fill(mask, NOBODY), self.weights.masked_fill(mask, 0.0))

    def repeated(self, rows: int) -> Choice:
        """The single row, repeated `rows` times."""
        return Choice(self.experts.repeat(rows, 1), self.weights.repeat(rows, 1))

    def of(self, rows: Sequence[int]) -> Choice:
        return Choice(self.experts[list(rows)], self.weights[list(rows)])


@dataclass(frozen=True)
class PromptRouting:
    """What is known of some prompts: their experts, and their `lengths` [rows] in tokens.

    `choice` is None for routers that choose for every token, `lengths` where all experts act on all
    tokens.
    """

    choice: Choice | None = None
    lengths: Tensor | None = None

    @classmethod
    def joined(cls, parts: Iterable[PromptRouting]) -> PromptRouting:
        routings = list(parts)
        choices = [routing.choice for routing in routings if routing.choice is not None]
        lengths = [routing.lengths for routing in routings if routing.lengths is not None]
        choice = Choice.joined(choices) if choices else None
        return cls(choice, torch.cat(lengths) if lengths else None)

    def of(self, rows: Sequence[int]) -> PromptRouting:
        choice = None if self.choice is None else self.choice.of(rows)
        lengths = None if self.lengths is None else self.lengths[list(rows)]
        return PromptRouting(choice, lengths)

    def each(self, rows: int) -> list[PromptRouting]:
        """One for each of its `rows`, which it can't count where nothing is known of them."""
        return [self.of([row]) for row in range(rows)]


@dataclass(frozen=True)
class Chosen:
    """What is chosen for one prompt, and why.

    `weights` are the experts' by name, best first; none where the base answers. `view` is the text
    that decided: a whole message, or a part of it. `scores` are those of that text by name, best
    first, with "base" for the base's best class if the router may leave prompts to it. Both are
    empty where no text was read. `nearest` has example prompts of the expert and the runner-up, by
    name, those most like the view first, if they were asked for and the experts bring some.
    """

    weights: dict[str, float]
    scores: dict[str, float] = field(default_factory=dict)
    view: str = ""
    nearest: dict[str, list[str]] = field(default_factory=dict)

    @property
    def expert(self) -> str:
        """The expert that weighs most, or "base"."""
        return next(iter(self.weights), BASE)

    @property
    def runner_up(self) -> str | None:
        """Whose score is best of those that don't answer; None where nobody else could."""
        answering = self.weights or BASE_ALONE
        return next((name for name in self.scores if name not in answering), None)

    @property
    def margin(self) -> float | None:
        """By how much the score of `expert` is above the runner-up's; None without either score.

        It is negative where a rule decided: an expert may answer with the base a little ahead, and
        a follow-up is for whoever answered before.
        """
        if self.runner_up is None or self.expert not in self.scores:
            return None
        return self.scores[self.expert] - self.scores[self.runner_up]

    def to_dict(self) -> dict[str, Any]:
        """All of this, for JSON."""
        return {
            "expert": self.expert,
            "runner_up": self.runner_up,
            "margin": self.margin,
            **vars(self),
        }


class ChoosesExperts(Protocol):
    """Who chooses the experts of whole prompts; `routers.prompt.PromptChooser` is one."""

    name: str
    unserved: str | None  # why a prompt alone isn't enough, as a sentence
    left: Collection[str]  # experts whose prompts the base answers

    def choose(self, prompts: Sequence[str | Sequence[int] | ChatTexts], **known: Any) -> Choice:
        """The experts of each prompt and their weights."""
