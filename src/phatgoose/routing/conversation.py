"""Which of a chat's texts chooses its experts: views of a text, turns, follow-ups, and the base.

A chat is read text by text, from its last message backwards. Each text is scored in several views.
Beside the experts, scores are of three classes of texts that no expert is for: general requests,
neutral passages, and follow-ups ("shorter, please"), which go on with whatever answered before.
They are in base_texts.toml. Not in the paper.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from ..tasks.task import said_in

BLANK_LINE = re.compile(r"\n\s*\n")
# Chosen on one of two sets of chats, written by two hands (docs/routers.md).
KEPT = 0.3  # by how much the base may be ahead of an expert that answered before
FOLLOWS = 0.6  # by how much others may be ahead of follow-ups


@cache
def base_texts() -> tuple[Sequence[str], ...]:
    """The texts of each of the base's classes."""
    content = (files(__package__) / "base_texts.toml").read_text(encoding="utf-8")
    return tuple(tomllib.loads(content).values())


# A text and, if it has several paragraphs, two of them: as tokens, or as text to be embedded.
Views = tuple[Sequence[int] | str, ...]


@dataclass(frozen=True)
class ChatTexts:
    """What routers by prompt read of a chat: the system prompt, and the user's messages.

    Each is read by itself, since instructions, tools and earlier turns would outweigh the question,
    and so are its first and its last paragraph, since a pasted passage would. `messages` are the
    last MOST_MESSAGES, the question last; `system` is empty where there is none.
    """

    system: Views
    messages: tuple[Views, ...]

    @classmethod
    def of(
        cls, turns: Iterable[tuple[str, str]], read: Callable[[list[str]], Iterable[Sequence[int]]]
    ) -> ChatTexts:
        """Of the turns (role, content); `read` makes tokens of texts."""
        system, messages = said_in(turns)
        # Spaces at an end are not read anywhere: in a prompt they would belong to the answer.
        views = [[v.rstrip(" ") for v in (text, *_ends_of(text))] for text in (system, *messages)]
        tokens = map(tuple, read([text for each in views for text in each]))
        of_each = [tuple(itertools.islice(tokens, len(each))) for each in views]
        return cls(of_each[0] if system else (), tuple(of_each[1:]))


def _ends_of(text: str) -> list[str]:
    paragraphs = BLANK_LINE.split(text.strip())
    return [paragraphs[0], paragraphs[-1]] if len(paragraphs) > 1 else []


class ScoredText:
    """What a text is most like, by scores of its views: the whole, its first and last paragraph.

    `scores` are those of the view whose best expert is furthest ahead of the base's general and
    neutral texts, and `lead` is by how much. Where a router knows no such texts, it is the view
    with the highest score. `follows` says whether the text as a whole is a follow-up.
    """

    def __init__(self, views: Tensor, allowances: Tensor) -> None:
        """Of `views` [V, E + 3], or [V, E] without the base's classes.

        `allowances` [E] say by how much the base may score more than each expert.
        """
        experts = len(allowances)
        best = views[:, :experts].max(dim=1)
        rest = views[:, experts:]
        base = rest[:, :-1].amax(dim=1) if rest.numel() else torch.zeros(len(views))
        view = int((best.values - base).argmax())
        self.scores = views[view]
        self._leads = self.scores - base[view]
        self._allowances = allowances
        self.expert = int(best.indices[view])
        self.lead = float(self._leads[self.expert])
        self.follows = bool(rest.numel() and rest[0, -1] > views[0, :-1].max() - FOLLOWS)

    def fits(self, expert: int, least: float = 0.0) -> bool:
        """Whether the base isn't ahead of `expert` by more than `least` and its allowance."""
        return bool(self._leads[expert] > -max(least, float(self._allowances[expert])))

    @property
    def decides(self) -> bool:
        """Whether what was said before doesn't matter."""
        return self.fits(self.expert) and not self.follows


def answer_to(messages: Sequence[ScoredText], *system: ScoredText) -> ScoredText | None:
    """The text by which the experts for the last of a chat's `messages` are chosen; None: the base.

    A follow-up is answered as what it follows. The system prompt comes first: it chooses if an
    expert is ahead of the base there. Of other messages it is enough that one fits, and of the
    expert that answered before that the base isn't ahead by more than KEPT.
    """
    answer = next((text for text in system if text.lead > 0), None)
    for text in messages:
        if answer and text.follows:
            continue
        if text.fits(text.expert):
            answer = text
        elif answer and not text.fits(answer.expert, KEPT):
            answer = None
    return answer
