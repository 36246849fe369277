"""What looks wrong with a routed model, and what to do about it."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..routing.composition import composition_of
from ..routing.layers import RoutedLinear
from .measures import effective_experts
from .routing_distribution import RoutingDistribution

__all__ = ["Finding", "findings_of", "vector_similarity"]

DOMINANT = 0.8  # an expert that is first choice more often than this takes everything
DUPLICATE = 0.95  # vectors whose mean cosine is above this are nearly one
UNDECIDED = 0.98  # a token's distribution of more than this share of the greatest entropy


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong: `kind` for programs, `message` for people, whom it is about.

    `kind` is "never-wins", "takes-everything", "near-duplicates" or "undecided".
    """

    kind: str
    message: str
    experts: tuple[str, ...] = ()


def findings_of(
    distributions: Mapping[str, RoutingDistribution], similarity: NDArray[Any] | None = None
) -> list[Finding]:
    """What looks wrong in one router's `distributions` (by dataset) and vectors, worst first.

    `similarity` [E, E] is that of `vector_similarity`. None means a router that doesn't compare
    experts, about which nothing is found.
    """
    if not distributions or similarity is None or len(similarity) < 2:
        return []
    together = functools.reduce(operator.add, distributions.values())
    where = f"on {len(distributions)} dataset{'s' if len(distributions) > 1 else ''}"
    return [
        *_dominant(together, where),
        *_losers(together, where),
        *_undecided(together),
        *_duplicates(together.experts, similarity),
    ]


def _dominant(found: RoutingDistribution, where: str) -> Iterator[Finding]:
    first = found.whole("first")
    best = int(first.argmax())
    if first[best] > DOMINANT:
        name, worth = found.experts[best], effective_experts(found.whole("weight"))
        yield Finding(
            "takes-everything",
            f"{name} is the first choice of {first[best]:.0%} of all decisions {where} (the "
            f"weights are worth {worth:.1f} experts): the pool is routed almost as {name} alone. "
            f"Compare with --router single --expert {name}.",
            (name,),
        )


def _losers(found: RoutingDistribution, where: str) -> Iterator[Finding]:
    first, chosen, tokens = found.whole("first"), found.whole("chosen"), found.passed()
    for index, name in enumerate(found.experts):
        acts = sum(bool(rows[:, index].any()) for rows in found.sums["probability"].values())
        if acts and first[index] == 0:
            seconds = f"among the chosen in {chosen[index]:.1%} of decisions"
            yield Finding(
                "never-wins",
                f"{name} is never the first choice {where} ({tokens:,} tokens at {acts} sites), "
                f"and is {seconds if chosen[index] else 'never chosen at all'}. Its gate may be "
                f"untrained, or its data far from these; train the gate anew (phatgoose gate) or "
                f"--leave-out {name}.",
                (name,),
            )


def _undecided(found: RoutingDistribution) -> Iterator[Finding]:
    share = found.token_entropy() / math.log(len(found.experts))
    if share > UNDECIDED:
        yield Finding(
            "undecided",
            f"The router hardly distinguishes the experts: a token's distribution has {share:.1%} "
            f"of the greatest entropy, so the chosen ones are weighted almost alike and close "
            f"calls decide who is chosen.",
        )


def _duplicates(experts: Sequence[str], similarity: NDArray[Any]) -> Iterator[Finding]:
    for (i, one), (j, other) in combinations(enumerate(experts), 2):
        if similarity[i, j] > DUPLICATE:
            yield Finding(
                "near-duplicates",
                f"{one} and {other} have nearly the same vectors (mean cosine "
                f"{similarity[i, j]:.3f} over sites): they take each other's places among the k. "
                f"Leave one out.",
                (one, other),
            )


def vector_similarity(model: PreTrainedModel) -> NDArray[np.float64] | None:
    """Mean cosine of two experts' router vectors over the sites where both act, [E, E].

    Gates and means are compared as the router scores with them: standardised (paper section 3),
    for affinity raw as they are; arrow's vectors up to their sign. 0 where two never meet or one is
    constant. None for routers without vectors. Raises RoutingError when `model` is not routed.
    """
    parts = composition_of(model)
    size = len(parts.experts)
    total, met = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, size)
    for layer in parts.layers.values():
        if not (isinstance(layer, RoutedLinear) and "vectors" in layer.router.kept):
            return None
        vectors = layer.router.vectors[:, : layer.in_features]  # centred ones have an offset more
        unit = torch.nn.functional.normalize(vectors.float().cpu(), dim=1)
        cosines = unit @ unit.T
        experts = layer.experts.cpu()
        rows = experts[:, None]
        total[rows, experts] += (cosines.abs() if layer.router.unsigned else cosines).double()
        met[rows, experts] += 1
    return np.asarray((total / met.clamp(min=1)).numpy())
