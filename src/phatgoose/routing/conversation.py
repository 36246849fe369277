"""Which of a chat's texts chooses its experts: views of a text, turns, follow-ups, and the base.

A chat is read text by text, from its last message backwards. Each text is scored in several views:
as a whole, and its parts, since people wrap what they ask for in politeness and pasted passages.
Beside the experts, scores are of classes of texts that no expert is for: general requests, plain
and polite, code, neutral passages, politeness, what chat interfaces ask in the background, frames
of agents, and follow-ups ("shorter, please"), which go on with whatever answered before. They are
in base_texts.toml. Not in the paper.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from torch import Tensor

from ..tasks.task import said_in

BLANK_LINE = re.compile(r"\n\s*\n")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
LEAST_WORDS = 3  # of a sentence that is read by itself
LEAST_SIGNS = 8  # the same where words aren't divided
MOST_SENTENCES = 12  # of a text
MOST_LINES = 6  # of several sentences, half of them from each end
# Chosen on one of several sets of texts, written by as many hands (docs/routers.md).
MARGIN = 0.2  # by how much more a part must lead than a whole text
KEPT = 0.3  # by how much the base may be ahead of an expert that answered before
FOLLOWS = 0.3  # by how much others may be ahead of follow-ups
ONLY_FOLLOWS = 0.6  # by how much follow-ups must be ahead where nothing was before
# In units of what a text in the middle of its class scores, which shrinks as pools grow:
LIKE_HELPERS = 0.75  # what an interface's request must score
HELPS = 0.7  # by how much it must be ahead of all else


@cache
def base_texts() -> Mapping[str, Sequence[str]]:
    """The texts of each of the base's classes, in the order of scores: follow-ups come last."""
    content = (files(__package__) / "base_texts.toml").read_text(encoding="utf-8")
    return tomllib.loads(content)


@cache
def helpers_class() -> int:
    return list(base_texts()).index("helpers")


class Views(NamedTuple):
    """What is read of a text: the whole, its first and last paragraph; and its parts."""

    wholes: tuple[str, ...]
    parts: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> Views:
        """Of a text with several paragraphs both ends, and of one with several sentences parts.

        Parts are sentences, and lines of several sentences.
        """
        paragraphs = BLANK_LINE.split(text.strip())
        ends = (paragraphs[0], paragraphs[-1]) if len(paragraphs) > 1 else ()
        wholes = (text, *ends)
        lines = {line.strip(): _sentences(line) for line in text.splitlines()}
        sentences = list(itertools.chain.from_iterable(lines.values()))
        if len(sentences) < 2:
            return cls(wholes)
        read = {whole.strip() for whole in wholes}
        longer = [line for line, row in lines.items() if len(row) > 1 and line not in read]
        if len(longer) > MOST_LINES:
            half = MOST_LINES // 2
            longer = [*longer[:half], *longer[-half:]]
        return cls(wholes, (*_nearest_to_breaks(sentences), *longer))


class Sentence(NamedTuple):
    """A sentence, and how many sentences of its line are before or after it, the fewer."""

    text: str
    inside: int


def _sentences(line: str) -> list[Sentence]:
    """The sentences of `line` that say something."""
    rows = [row.strip() for row in SENTENCE_END.split(line)]
    told = [row for row in rows if _says_something(row)]
    return [Sentence(row, min(at, len(told) - 1 - at)) for at, row in enumerate(told)]


def _says_something(row: str) -> bool:
    is_undivided = not row.isascii() and " " not in row
    return len(row.split()) >= LEAST_WORDS or (is_undivided and len(row) >= LEAST_SIGNS)


def _nearest_to_breaks(sentences: Sequence[Sentence]) -> list[str]:
    """Those that are read: people ask at an end of a line, or of the text."""

    def distance(number: int) -> tuple[int, int]:
        from_end = min(number, len(sentences) - 1 - number)
        return sentences[number].inside, from_end

    nearest = sorted(range(len(sentences)), key=distance)
    return [sentences[number].text for number in sorted(nearest[:MOST_SENTENCES])]


@dataclass(frozen=True)
class ChatTexts:
    """What routers by prompt read of a chat: the system prompt, and the user's messages.

    Each is read by itself, since instructions, tools and earlier turns would outweigh the question.
    `messages` are the user's last MOST_MESSAGES, the question last. Where no user says anything it
    is the chat's last message, whoever wrote it, and none where there is no text at all. `system`
    is None where there is none.
    """

    system: Views | None
    messages: tuple[Views, ...]

    @classmethod
    def of(cls, turns: Iterable[tuple[str, str]]) -> ChatTexts:
        """Of the turns (role, content)."""
        system, messages = said_in(turns)
        views = tuple(Views.of(text) for text in messages if text.strip())
        return cls(Views.of(system) if system else None, views)


class ScoredText:
    """What a text is most like, by scores of its views.

    `scores` are those of the view whose best expert is furthest ahead of the base's classes, and
    `lead` is by how much. Where a router knows no such classes, it is the view with the highest
    score. Of the text as a whole, `follows` says whether it may be a follow-up, `only_follows` that
    it is nothing else, and `is_helper` whether an interface asks rather than its user.
    """

    follows = False
    only_follows = False
    is_helper = False

    def __init__(
        self,
        scores: Tensor,
        allowances: Tensor,
        whole_count: int | None = None,
        helpers: float = float("inf"),
        texts: Sequence[str] = (),
    ) -> None:
        """By the `scores` of its views, [V, E + classes], or [V, E] without the base's classes.

        `allowances` [E] say by how much the base may score more than each expert. The first
        `whole_count` of the views are no parts, all of them where it is None. `helpers` is what a
        text in the middle of the helpers' class scores, infinite where that isn't known. `texts`
        are what was read.
        """
        experts = len(allowances)
        leads = scores[:, :experts]
        classes = scores[:, experts:]
        if classes.numel():
            # The last class, follow-ups, isn't the base's to answer.
            leads = leads - classes[:, :-1].amax(dim=1, keepdim=True)
        by_view = leads.amax(dim=1)
        if whole_count is not None:
            by_view[whole_count:] -= MARGIN
        view = int(by_view.argmax())
        self.view = texts[view] if texts else ""  # the text that `scores` are of
        self.scores = scores[view]
        self._leads = leads[view]
        self._allowances = allowances
        self.expert = int(self._leads.argmax())
        self.lead = float(by_view[view])
        if classes.numel():
            self._recognise(scores[0], experts + helpers_class(), helpers)

    def _recognise(self, whole: Tensor, helper: int, helpers: float) -> None:
        """Whether the `whole` [E + classes] is a follow-up, or scores at `helper` as helpers do."""
        others = whole[:-1].clone()
        ahead = float(whole[-1] - others.max())
        self.follows = ahead > -FOLLOWS
        self.only_follows = ahead > ONLY_FOLLOWS
        others[helper] = float("-inf")
        is_like = whole[helper] > LIKE_HELPERS * helpers
        self.is_helper = bool(is_like and whole[helper] > others.max() + HELPS * helpers)

    def fits(self, expert: int, least: float = 0.0) -> bool:
        """Whether the base isn't ahead of `expert` by more than `least` and its allowance."""
        return bool(self._leads[expert] > -max(least, float(self._allowances[expert])))

    @property
    def decides(self) -> bool:
        """Whether what was said before doesn't matter."""
        return self.is_helper or (self.fits(self.expert) and not self.follows)


def deciding_text(messages: Sequence[ScoredText], *system: ScoredText) -> ScoredText | None:
    """The text by which the experts for the last of a chat's `messages` are chosen; None: the base.

    The messages are in the order of the chat, the system prompt behind them if there is one.

    A follow-up is answered as what it follows, and what an interface asks by the base. The system
    prompt comes first: it chooses if an expert is ahead of the base there. Of other messages it is
    enough that one fits, and of the expert that answered before that the base isn't ahead by more
    than KEPT.
    """
    deciding = next((text for text in system if text.lead > 0), None)
    for text in messages:
        if text.is_helper:
            deciding = None
        elif text.follows and (deciding or text.only_follows):
            continue
        elif text.fits(text.expert):
            deciding = text
        elif deciding and not text.fits(deciding.expert, KEPT):
            deciding = None
    return deciding
