"""Warnings of an analysis: what looks wrong, near-duplicates among it."""

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
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ConfigError, RoutingError
from ..experts.kind import Part
from ..experts.pool import Pool
from ..routing.composition import composition_of
from ..routing.layers import RoutedLinear
from ..routing.routers.router import ABSOLUTE
from ..routing.stacks import stack_of
from .measures import effective_experts
from .routing_distribution import RoutingDistribution

BLOCK = 2048  # rows of factors at once


@dataclass(frozen=True)
class Duplicate:
    """Two experts whose updates point the same way; `cosine` is between them as matrices."""

    one: str
    other: str
    cosine: float
    identical: bool


def near_duplicates(pool: Pool, threshold: float = 0.99) -> list[Duplicate]:
    """Pairs of experts whose updates have a cosine of at least `threshold`, the nearest first."""
    if not 0 < threshold <= 1:
        raise ConfigError(f"duplicates is {threshold}, but must be above 0 and at most 1.")
    hashes = [expert.info.adapter_sha256 for expert in pool.experts]
    file = torch.tensor([hashes.index(sha256) for sha256 in hashes])
    identical = file[:, None] == file
    found = cosines(pool).masked_fill(identical, 1.0)
    near = (found >= threshold).triu(diagonal=1)
    pairs = [
        Duplicate(pool.names[i], pool.names[j], float(found[i, j]), bool(identical[i, j]))
        for i, j in near.nonzero().tolist()
    ]
    return sorted(pairs, key=lambda pair: (-pair.identical, -pair.cosine, pair.one, pair.other))


def cosines(pool: Pool) -> Tensor:
    """The cosine of every two experts' whole updates, float64 [E, E]; 0 for an update that is zero.

    All B A of all sites are one long vector, scales included. No B A is ever formed: <B A, B' A'> =
    sum of (Bᵀ B') ⊙ (A A'ᵀ). For a bottleneck adapter U D replaces B A, for (IA)³ the vector l - 1.
    Experts of different kinds have the cosine 0. Raises RoutingError for a kind that can't be
    compared.
    """
    products = torch.zeros(len(pool), len(pool), dtype=torch.float64)
    for site in pool.sites:
        stack = stack_of(pool, site, torch.float32, torch.device("cpu"))
        for part, rows in stack.rows().items():
            at = stack.experts[rows]
            products[at[:, None], at] += _products_of(stack.parts[part])
        pool.release()
    norms = products.diagonal().clamp(min=0).sqrt()
    norms = norms.where(norms > 0, torch.inf)
    return (products / norms[:, None] / norms).clamp(-1, 1)


def squared_norms(part: Part) -> Tensor:
    """The squared Frobenius norm of each update of a part of a stack, float64 [E]."""
    first, *last = (each.double() for each in _factors_of(part))
    if not last:
        return first.square().sum(dim=1)
    grams = first @ first.mT, last[0] @ last[0].mT
    return (grams[0] * grams[1]).sum(dim=(1, 2)).clamp(min=0)


def _products_of(part: Part) -> Tensor:
    first, *last = _factors_of(part)
    return _products(first, last[0]) if last else (first @ first.T).double()


def _factors_of(part: Part) -> list[Tensor]:
    if not part.compared:
        raise RoutingError(
            f"Experts of the kind {part.name!r} can't be compared with others; leave them out."
        )
    return [getattr(part, field) for field in part.compared]


def _products(A: Tensor, B: Tensor) -> Tensor:
    """The scalar products of all updates of a stack, A [E, r, n] and B [E, r, d], [E, E]."""
    E, r = A.shape[:2]
    products = torch.empty(E, E, dtype=torch.float64)
    step = max(1, BLOCK // r)
    for first in range(0, E, step):
        # Products are symmetric: those below the diagonal are copied.
        block, rest = slice(first, first + step), slice(first, E)
        inner = A[block].flatten(0, 1) @ A[rest].flatten(0, 1).T  # [b r, E' r]
        inner *= B[block].flatten(0, 1) @ B[rest].flatten(0, 1).T
        sums = inner.view(len(A[block]), r, len(A[rest]), r).sum(dim=(1, 3))
        products[block, rest] = sums.double()
        products[rest, block] = sums.double().T
    return products


DOMINANT = 0.8  # an expert that is first choice more often than this takes everything
DUPLICATE = 0.95  # vectors whose mean cosine is above this are nearly one
UNDECIDED = 0.98  # a token's distribution of more than this share of the greatest entropy


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong: `kind` for programs, `message` for people, whom it is about."""

    kind: str
    message: str
    experts: tuple[str, ...] = ()


def findings_of(
    distributions: Mapping[str, RoutingDistribution], similarity: NDArray[Any] | None
) -> list[Finding]:
    """What looks wrong in one router's `distributions` (by dataset) and vectors, worst first.

    `similarity` [E, E] is that of the vectors; None, for routers without, finds nothing.
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
            f"Compare with --router single:expert={name}.",
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
                f"untrained, or its data far from these; train the gate again (phatgoose gate) or "
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

    As the router scores with them: standardised (paper section 3), or arrow's up to their sign.
    None for routers without vectors.
    """
    parts = composition_of(model)
    size = len(parts.experts)
    total, met = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, size)
    for layer in parts.layers.values():
        if not (isinstance(layer, RoutedLinear) and "vectors" in layer.router.state()):
            return None
        is_unsigned = layer.router.router.fused == ABSOLUTE
        unit = torch.nn.functional.normalize(layer.router.vectors.float().cpu(), dim=1)
        cosines = unit @ unit.T
        experts = layer.experts.cpu()
        rows = experts[:, None]
        total[rows, experts] += (cosines.abs() if is_unsigned else cosines).double()
        met[rows, experts] += 1
    return np.asarray((total / met.clamp(min=1)).numpy())
