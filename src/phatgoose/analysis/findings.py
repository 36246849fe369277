"""What looks wrong with a routed model, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..routing.composition import composition_of
from ..routing.layers import RoutedLinear
from ..routing.routers.per_token.arrow import ArrowRouter
from ..routing.routers.per_token.vector_router import VectorRouter
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
    profiles: Mapping[str, RoutingDistribution], similarity: NDArray[Any] | None = None
) -> list[Finding]:
    """What looks wrong in one router's `profiles` (by dataset) and vectors, worst first.

    `similarity` [E, E] is that of `vector_similarity`. None means a router that doesn't compare
    experts, about which nothing is found.
    """
    together = _sum(list(profiles.values()))
    if together is None or len(together.experts) < 2 or similarity is None:
        return []
    where = f"on {len(profiles)} dataset{'s' if len(profiles) > 1 else ''}"
    return [
        *_dominant(together, where),
        *_losers(together, where),
        *_undecided(together),
        *_duplicates(together.experts, similarity),
    ]


def _sum(profiles: Sequence[RoutingDistribution]) -> RoutingDistribution | None:
    total = profiles[0] if profiles else None
    for profile in profiles[1:]:
        total = total + profile if total is not None else profile
    return total


def _dominant(profile: RoutingDistribution, where: str) -> list[Finding]:
    first = profile.whole("first")
    best = int(first.argmax())
    if first[best] <= DOMINANT:
        return []
    name = profile.experts[best]
    others = effective_experts(profile.whole("weight"))
    return [
        Finding(
            "takes-everything",
            f"{name} is the first choice of {first[best]:.0%} of all decisions {where} (the "
            f"weights are worth {others:.1f} experts): the pool is routed almost as {name} alone. "
            f"Compare with --router single --expert {name}, or look at its gate.",
            (name,),
        )
    ]


def _losers(profile: RoutingDistribution, where: str) -> list[Finding]:
    found = []
    first, chosen = profile.whole("first"), profile.whole("chosen")
    for index, name in enumerate(profile.experts):
        acts = [site for site, rows in profile.sums["probability"].items() if rows[:, index].any()]
        if acts and first[index] == 0:
            tokens = profile.passed()
            seconds = f"among the chosen in {chosen[index]:.1%} of decisions"
            found.append(
                Finding(
                    "never-wins",
                    f"{name} is never the first choice {where} ({tokens:,} tokens at {len(acts)} "
                    f"sites), and is {seconds if chosen[index] else 'never chosen at all'}. Its "
                    f"gate may be untrained, or its data far from these; train the gate anew "
                    f"(phatgoose gate) or --leave-out {name}.",
                    (name,),
                )
            )
    return found


def _undecided(profile: RoutingDistribution) -> list[Finding]:
    highest = math.log(len(profile.experts))
    share = profile.token_entropy() / highest
    if share <= UNDECIDED:
        return []
    return [
        Finding(
            "undecided",
            f"The router hardly tells the experts apart: a token's distribution has {share:.1%} of "
            f"the greatest entropy, so the chosen ones are weighted almost alike and close calls "
            f"decide who is chosen.",
        )
    ]


def _duplicates(experts: Sequence[str], similarity: NDArray[Any]) -> list[Finding]:
    found = []
    for one in range(len(experts)):
        for other in range(one + 1, len(experts)):
            if similarity[one, other] > DUPLICATE:
                names = (experts[one], experts[other])
                found.append(
                    Finding(
                        "near-duplicates",
                        f"{names[0]} and {names[1]} have nearly the same vectors (mean cosine "
                        f"{similarity[one, other]:.3f} over sites): they take each other's places "
                        f"among the k. Leave one out.",
                        names,
                    )
                )
    return found


def vector_similarity(model: PreTrainedModel) -> NDArray[np.float64] | None:
    """Mean cosine of two experts' router vectors over the sites where both act, [E, E].

    Gates and means are compared standardised, as the router uses them (paper section 3); arrow's
    vectors up to their sign. 0 where two never meet or one is constant. None for routers without
    vectors. Raises RoutingError when `model` is not routed.
    """
    parts = composition_of(model)
    size = len(parts.experts)
    total, met = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, size)
    for layer in parts.layers.values():
        if not (isinstance(layer, RoutedLinear) and isinstance(layer.router, VectorRouter)):
            return None
        unit = torch.nn.functional.normalize(layer.router.vectors.float().cpu(), dim=1)
        cosines = unit @ unit.T
        experts = layer.experts.cpu()
        rows = experts[:, None]
        total[rows, experts] += (
            cosines.abs() if isinstance(layer.router, ArrowRouter) else cosines
        ).double()
        met[rows, experts] += 1
    return np.asarray((total / met.clamp(min=1)).numpy())
