"""Numbers of routing: entropy, agreement, divergence from Oracle, leave-one-out effects.

As docs/analysis.md states them; all logarithms are natural. A distribution here is an array [E] of
shares that sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ConfigError, EvaluationError
from ..evaluation.evaluate import Evaluation
from ..evaluation.intervals import Interval, SharedMeans, Z
from ..experts.kind import dense_weights
from ..routing.routers.scores import Scores, best_expert_by_task
from ..routing.watching import SitePass
from ..sites import Stream
from .routing_distribution import Observer

Array = NDArray[np.float64]


def as_distribution(values: ArrayLike) -> Array:
    """`values` [.., E], not all 0, over their sum."""
    shares = np.asarray(values, float)
    return np.asarray(shares / shares.sum(axis=-1, keepdims=True))


def entropy(p: ArrayLike) -> float:
    """H(p) = -sum of p ln p, from 0 (one expert) to ln E (all alike)."""
    shares = as_distribution(p)
    present = shares[shares > 0]
    return float(max(0.0, -(present * np.log(present)).sum()))


def effective_experts(p: ArrayLike) -> float:
    """The number of experts that, with equal shares, would have this entropy: exp H(p), 1 to E."""
    return math.exp(entropy(p))


def load(p: ArrayLike) -> Array:
    """E p: each expert's share as a multiple of an even one, [E]."""
    shares = as_distribution(p)
    return np.asarray(shares * shares.shape[-1])


def concentration(p: ArrayLike) -> float:
    """Sum of p² (Herfindahl): the chance that two tokens drawn at random go to the same expert."""
    return float((as_distribution(p) ** 2).sum())


def overlap(p: ArrayLike, q: ArrayLike) -> float:
    """Sum of min(p, q): 1 less the total variation distance; 1 if equal, 0 if disjoint."""
    return float(np.minimum(as_distribution(p), as_distribution(q)).sum())


def heaviest(weights: NDArray[Any], most: int) -> list[int]:
    """The indices of the greatest weights, greatest first, without those of 0."""
    ranked = np.argsort(-weights, kind="stable")[:most]
    return [int(z) for z in ranked if weights[z] > 0]


def margins(weights: Array) -> Array:
    """By how much each row of `weights` [prompts, E] prefers its first expert to its second."""
    ranked = np.sort(weights, axis=1)
    return np.asarray(ranked[:, -1] - (ranked[:, -2] if weights.shape[1] > 1 else 0))


@dataclass(frozen=True)
class Agreement:
    """How far two routers agree over `decisions` (tokens x sites where both act).

    `first` is the share of decisions with the same first choice, `overlap` the mean of the sum over
    z of min(w_z, w'_z).
    """

    first: float
    overlap: float
    decisions: int


class DecisionFiles(Observer):
    """Writes the decisions of each pass into a new `folder`; FileExistsError if it is there.

    `pool_index` [E] has the index among all experts of each one that the model has.
    """

    def __init__(self, folder: Path, pool_index: Tensor) -> None:
        self.folder, self.passes = folder, 0
        self._pool_index = pool_index
        self._tensors: dict[str, Tensor] = {}
        folder.mkdir(parents=True)

    def begin_pass(self, parts: Mapping[Stream, Tensor]) -> None:
        self._tensors = {}

    def add(self, passed: SitePass) -> None:
        keep, site = passed.is_real().flatten(), passed.site.name
        chosen = self._pool_index[passed.experts.cpu()[keep]]
        self._tensors[f"experts.{site}"] = chosen.to(torch.int16).contiguous()
        self._tensors[f"weights.{site}"] = passed.weights.cpu()[keep].float().contiguous()

    def end_pass(self) -> None:
        # To a file, since the decisions of a whole task would fill the memory.
        save_file(self._tensors, self.folder / f"{self.passes:06}.safetensors")
        self.passes += 1


def agreement(first: Path, second: Path, pool_size: int) -> Agreement | None:
    """The agreement of two routers by their `DecisionFiles`, None if they share no site."""
    same, common, decisions = 0.0, 0.0, 0
    for one, other in _pairs(first, second, pool_size):
        same += float(torch.minimum(_first(one), _first(other)).sum())
        common += float(torch.minimum(one, other).sum())
        decisions += len(one)
    return Agreement(same / decisions, common / decisions, decisions) if decisions else None


def _pairs(first: Path, second: Path, pool_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    def dense(tensors: Mapping[str, Tensor], site: str) -> Tensor:
        experts, weights = tensors[f"experts.{site}"], tensors[f"weights.{site}"]
        return dense_weights(experts.long(), weights.float(), pool_size)

    for file in sorted(first.iterdir()):
        one, other = load_file(file), load_file(second / file.name)
        for key in one.keys() & other.keys():
            if key.startswith("experts."):
                site = key.removeprefix("experts.")
                rows = dense(one, site), dense(other, site)
                # A router that gives a token no expert here has made no choice to compare.
                decided = rows[0].any(dim=1) & rows[1].any(dim=1)
                yield rows[0][decided], rows[1][decided]


def _first(weights: Tensor) -> Tensor:
    best = (weights == weights.amax(dim=1, keepdim=True)).float()
    return best / best.sum(dim=1, keepdim=True)


# Paper section 4.4: Oracle sends all tokens of a dataset to its best single expert. The paper finds
# a Pearson correlation of -0.2 between PHATGOOSE's divergence from Oracle and its score, over
# datasets.

ORACLE = "oracle"
SMOOTHING = 0.01  # the share of the uniform distribution that is mixed in before a KL divergence


def oracle_experts(
    scores: Scores | None, experts: Sequence[str], datasets: Sequence[str]
) -> dict[str, str]:
    """Each dataset's expert of the highest score; {} without scores. Raises ConfigError."""
    if scores is None:
        return {}
    best = best_expert_by_task(scores, experts)
    for dataset in datasets:
        if dataset not in best:
            raise ConfigError(
                f"The scores of single experts don't have task {dataset!r}; they have "
                f"{', '.join(sorted(best))}."
            )
    return {dataset: best[dataset] for dataset in datasets}


def smoothed(p: ArrayLike, smoothing: float = SMOOTHING) -> Array:
    """(1 - s) p + s/E, so that no share is 0. Raises EvaluationError unless 0 < s < 1."""
    if not 0 < smoothing < 1:
        raise EvaluationError(f"smoothing is {smoothing}, but must be between 0 and 1.")
    shares = as_distribution(p)
    return np.asarray((1 - smoothing) * shares + smoothing / shares.shape[-1])


def kl_divergence(p: ArrayLike, q: ArrayLike, smoothing: float = SMOOTHING) -> float:
    """KL(p ‖ q) = sum of p ln(p/q), both smoothed alike, without which Oracle's zeros make it ∞."""
    first, second = smoothed(p, smoothing), smoothed(q, smoothing)
    return float(max(0.0, (first * np.log(first / second)).sum()))


@dataclass(frozen=True)
class Divergence:
    """KL divergences between distributions p and q: `to` is KL(p ‖ q), `back` KL(q ‖ p)."""

    to: float
    back: float


@dataclass(frozen=True)
class Correlation:
    """Pearson's and Spearman's coefficients over n pairs, with 95 % intervals.

    By Fisher's z = artanh r, with standard error 1/√(n - 3); for Spearman's that of Bonett and
    Wright, √((1 + ρ²/2) / (n - 3)). Coefficients need three pairs and no constant side, intervals
    four.
    """

    n: int
    pearson: float | None = None
    pearson_interval: Interval | None = None
    spearman: float | None = None
    spearman_interval: Interval | None = None


def correlation(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Pearson's and Spearman's coefficients of pairs, where there are any (see the class)."""
    first, second = np.asarray(x, float), np.asarray(y, float)
    n = len(first)
    if n < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return Correlation(n)
    r, rho = _pearson(first, second), _pearson(_ranks(first), _ranks(second))
    return Correlation(
        n, r, _fisher_interval(r, 1, n), rho, _fisher_interval(rho, 1 + rho**2 / 2, n)
    )


def _pearson(x: Array, y: Array) -> float:
    def direction(values: Array) -> Array:
        scaled = values / np.abs(values).max()  # squares of the smallest numbers would be 0
        centred = scaled - scaled.mean()
        return np.asarray(centred / np.linalg.norm(centred))

    return min(1.0, max(-1.0, float(direction(x) @ direction(y))))


def _ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[places])


def _fisher_interval(coefficient: float, variance: float, n: int) -> Interval | None:
    if n < 4:
        return None
    if abs(coefficient) == 1:
        return Interval(coefficient, coefficient)
    half = Z * math.sqrt(variance / (n - 3))
    centre = math.atanh(coefficient)
    return Interval(math.tanh(centre - half), math.tanh(centre + half))


@dataclass(frozen=True)
class Effect:
    """What an expert adds: the mean score with all experts less the mean score without this one.

    The interval resamples tasks and, within them, examples, the same ones for both models.
    """

    expert: str
    mean: float
    interval: Interval
    by_task: Mapping[str, float]


def leave_one_out(
    everyone: Evaluation, experts: Iterable[str], without: Callable[[str], Evaluation]
) -> list[Effect]:
    """The effect of each of `experts`, greatest first; `without(expert)` evaluates the reduced
    model.
    """
    effects = []
    for expert in experts:
        reduced = without(expert)
        both = {"all": everyone, "less": reduced}
        means = SharedMeans.of(
            {name: [score.sample for score in each.scores] for name, each in both.items()}
        )
        by_task = {
            one.task: one.score - other.score
            for one, other in zip(everyone.scores, reduced.scores, strict=True)
        }
        effects.append(Effect(expert, *means.gain("all", "less"), by_task))
    return sorted(effects, key=lambda effect: effect.mean, reverse=True)
