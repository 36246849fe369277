"""Rules of benchmarks/people.py: which expert answers, by states of a message's views.

Discriminant is the product's own, over the package's statistics; the others are baselines.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from people_cases import Case
from phatgoose.experts.statistics import PARTS, READ, moments_of
from phatgoose.routing.conversation import ChatTexts
from phatgoose.routing.routers.discriminant import COUNTS, Discriminant
from phatgoose.routing.routers.prompt import Tables

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")
LEAST_WORDS = 3  # of a sentence that is a view
LEAST_SIGNS = 8  # the same where words aren't divided
MOST_PARTS = 24  # sentences and as many pairs, from both ends of a text
Scores = Callable[[Tensor], Tensor]  # [texts, blocks, d] to [texts, E + classes of the base]


@dataclass(frozen=True)
class Rule:
    """How an expert is chosen by states: one of MAKERS, and its options."""

    name: str = "discriminant"
    views: str = "product"
    margin: float = 0.0
    politeness: int = 0
    fallback: float = 0.15
    unit: str = "fixed"

    @classmethod
    def of(cls, named: str) -> Rule:
        """By its name and options, as discriminant:views=pairs:margin=0.3."""
        name, *options = named.split(":")
        values: dict[str, Any] = {"name": name}
        for option in options:
            key, _, value = option.partition("=")
            values[key] = type(getattr(cls, key))(value)
        rule = cls(**values)
        if rule.name not in MAKERS or rule.views not in PARTS_OF or rule.unit not in UNITS:
            raise SystemExit(f"There is no rule {named!r}: see --help.")
        return rule


# Views of a text beside the product's.


def sentences(text: str) -> list[str]:
    """The sentences of `text` that say something, if there are several."""
    rows = [row.strip() for row in SENTENCE_END.split(text)]
    said = [row for row in rows if len(row.split()) >= LEAST_WORDS or _is_long_in_signs(row)]
    return said if len(said) > 1 else []


def _is_long_in_signs(row: str) -> bool:
    return not row.isascii() and " " not in row and len(row) >= LEAST_SIGNS


def pairs(text: str) -> list[str]:
    """The sentences, and each two that follow one another."""
    single = sentences(text)
    double = [f"{one} {two}" for one, two in itertools.pairwise(single)]
    return [*_ends(single), *_ends(double)]


def _ends(rows: list[str]) -> list[str]:
    half = MOST_PARTS // 2
    return rows if len(rows) <= MOST_PARTS else rows[:half] + rows[-half:]


PARTS_OF: Mapping[str, Callable[[str], list[str]]] = {
    "product": lambda text: [],
    "sentences": lambda text: _ends(sentences(text)),
    "pairs": pairs,
}
UNITS = ("fixed", "median")


class Viewed(NamedTuple):
    """A message's views: as the product has them, then parts."""

    wholes: list[str]
    parts: list[str]


def _as_text(texts: list[str]) -> Any:
    """Each text in place of its tokens: it is the reader that makes tokens."""
    return [[text] for text in texts]


def viewed(case: Case, views: str) -> list[Viewed]:
    """The views of each of the user's messages."""
    chat = ChatTexts.of(case.turns, _as_text)
    wholes = [[str(view[0]) for view in message] for message in chat.messages]
    return [Viewed(each, PARTS_OF[views](each[0])) for each in wholes]


# Rules: scores of experts and of the base's classes, from states of examples of both.


class Fitted(NamedTuple):
    """A rule for a pool: scores, and by how much the base may lead each expert."""

    scores: Scores
    allowances: Tensor


Classes = Sequence[Tensor]  # of examples [examples, blocks, d], for each expert or class


def discriminant(experts: Classes, base: Classes, rule: Rule) -> Fitted:
    """The product's router, over the package's own statistics."""
    rows, classes = (_moments(each) for each in (experts, base))
    counts = torch.tensor([float(len(each)) for each in experts])
    tensors = {f"readings.{READ}.{part}": rows[part] for part in PARTS}
    names = tuple(map(str, range(len(experts))))
    tables = Tables(names, {**tensors, COUNTS: counts}, base=classes)
    router = Discriminant(fallback=rule.fallback)
    lines = router.ready(tables)
    return Fitted(lambda states: router.prompt_scores(states, lines), router.allowances(tables))


def _moments(every: Classes) -> dict[str, Tensor]:
    moments = [moments_of(states) for states in every]
    return {part: torch.stack([each[part] for each in moments]) for part in PARTS}


def nearest(experts: Classes, base: Classes, _: Rule) -> Fitted:
    """The nearest example, by the cosine of standardised states."""
    every, unit = _of_all(experts, base), _standardised([*experts, *base])
    examples = [unit(states) for states in every]

    def scores(states: Tensor) -> Tensor:
        rows = unit(states)
        return _no_follow_ups([(rows @ each.T).amax(dim=1) for each in examples])

    return Fitted(scores, torch.zeros(len(experts)))


def centroid(experts: Classes, base: Classes, _: Rule) -> Fitted:
    """The nearest mean of examples, by the same cosine."""
    every, unit = _of_all(experts, base), _standardised([*experts, *base])
    means = [normalize(unit(states).mean(dim=0), dim=0) for states in every]
    return Fitted(
        lambda states: _no_follow_ups([unit(states) @ mean for mean in means]),
        torch.zeros(len(experts)),
    )


def logistic(experts: Classes, base: Classes, _: Rule) -> Fitted:
    """Logistic regression over the same states; log-probabilities."""
    # It comes with sentence-transformers.
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    every, unit = _of_all(experts, base), _standardised([*experts, *base])
    owners = [number for number, states in enumerate(every) for _ in states]
    model = LogisticRegression(C=100.0, class_weight="balanced", max_iter=300)
    model.fit(unit(torch.cat(every)).numpy(), owners)

    def scores(states: Tensor) -> Tensor:
        return _no_follow_ups(torch.tensor(model.predict_log_proba(unit(states).numpy())).T)

    return Fitted(scores, torch.zeros(len(experts)))


def _of_all(experts: Classes, base: Classes) -> list[Tensor]:
    """Experts and the base's classes but follow-ups: what a leading one means differs by rule."""
    return [*experts, *base[:-1]]


def _standardised(every: Classes) -> Scores:
    """States as unit vectors, after their mean and deviation over all examples."""
    examples = torch.cat(list(every))
    mean, deviation = examples.mean(dim=0), examples.std(dim=0).clamp(min=1e-6)
    return lambda states: normalize(((states - mean) / deviation).flatten(1), dim=1)


def _no_follow_ups(columns: Iterable[Tensor]) -> Tensor:
    rows = [column.float() for column in columns]
    return torch.stack([*rows, torch.full_like(rows[0], -torch.inf)], dim=1)


MAKERS: Mapping[str, Callable[[Classes, Classes, Rule], Fitted]] = {
    "discriminant": discriminant,
    "nearest": nearest,
    "centroid": centroid,
    "logistic": logistic,
}


def in_medians(fitted: Fitted, base: Classes) -> Fitted:
    """Allowances in units of the median lead of the base's own texts, its general and neutral."""
    scores = fitted.scores(torch.cat(list(base[:2])))
    experts = len(fitted.allowances)
    leads = scores[:, :experts].amax(dim=1) - scores[:, experts:-1].amax(dim=1)
    return fitted._replace(allowances=fitted.allowances * leads.median().abs())
