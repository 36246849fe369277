"""Rules of benchmarks/people.py: which expert answers, by states of a message's views.

Discriminant is the product's own, over the package's statistics; the others are baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from people_cases import Case
from phatgoose.experts.statistics import PARTS, moments_of
from phatgoose.reader import Reader
from phatgoose.routing import conversation
from phatgoose.routing.conversation import ChatTexts
from phatgoose.routing.routers.discriminant import (
    COUNTS,
    Discriminant,
    Ready,
    middle_of_helpers,
    room_of,
    scores_by,
)
from phatgoose.routing.routers.prompt import Tables

VIEWS = ("wholes", "parts")
UNITS = ("fixed", "median")
Scores = Callable[[Tensor], Tensor]  # [texts, blocks, d] to [texts, E + classes of the base]


@dataclass(frozen=True)
class Rule:
    """How an expert is chosen by states: one of MAKERS, and its options."""

    name: str = "discriminant"
    views: str = "parts"
    margin: float = conversation.MARGIN
    helps: float = conversation.HELPS
    only_follows: float = conversation.ONLY_FOLLOWS
    classes: str = ""
    fallback: float = 0.3
    unit: str = "fixed"

    @classmethod
    def of(cls, named: str) -> Rule:
        """By its name and options, as discriminant:views=wholes:fallback=0.3."""
        name, *options = named.split(":")
        values: dict[str, Any] = {"name": name}
        for option in options:
            key, _, value = option.partition("=")
            values[key] = type(getattr(cls, key))(value)
        rule = cls(**values)
        if rule.name not in MAKERS or rule.views not in VIEWS or rule.unit not in UNITS:
            raise SystemExit(f"There is no rule {named!r}: see --help.")
        return rule


class Viewed(NamedTuple):
    """A message's views: the whole text with its ends, and then parts."""

    wholes: tuple[str, ...]
    parts: tuple[str, ...]


def viewed(case: Case, views: str) -> list[Viewed]:
    """The views of each of the user's messages; those of `views` alone."""
    messages = ChatTexts.of(case.turns).messages
    return [Viewed(each.wholes, each.parts if views == "parts" else ()) for each in messages]


# Rules: scores of experts and of the base's classes, from states of examples of both.


class Fitted(NamedTuple):
    """A rule for a pool: scores, and by how much the base may lead each expert."""

    scores: Scores
    allowances: Tensor
    helpers: float = float("inf")  # what the middle of the helpers' class scores


Classes = Sequence[Tensor]  # of examples [examples, blocks, d], for each expert or class


def discriminant(experts: Classes, base: Classes, rule: Rule) -> Fitted:
    """The product's router, over the package's own statistics."""
    moments = _moments([*experts, *base])
    counts = torch.tensor([float(len(each)) for each in experts])
    names = tuple(map(str, range(len(experts))))
    router = Discriminant(fallback=rule.fallback)
    lines = router.lines(moments)
    helpers = middle_of_helpers(lines, moments["mean"])
    # The states are there, so nothing is read.
    ready = Ready(lines, cast("Reader", None), helpers, room_of(lines, moments["mean"]))
    allowances = router.allowances(Tables(names, {COUNTS: counts}), ready)
    return Fitted(partial(scores_by, lines), allowances, helpers)


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
