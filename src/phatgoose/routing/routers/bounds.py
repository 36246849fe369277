"""Bounds on what one expert adds to the statistics that a pool shares.

Anybody may contribute an expert, and its statistics may be anything. A mean over E experts is
moved as far as one likes by one of them, so each contribution counts for at most E times the
pool's median: then one alone adds no more to the mean than the median expert is worth. Variances
along a direction may be VARIED times that, because honest experts' differ so much: where most
prompts end in one word, one expert's that don't vary a thousand times as much there. (Of 1, 3, 10,
30 and 100, 30 was the least that left honest pools' choices as they were; benchmarks/bounds.py.)
What lies within its bound is not changed by a bit. Pools of one or two experts have no bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

VARIED = 30
COMPARED = 32  # experts at most whose median a direction's bound is made of
SMALLEST = 1e-6  # of the means' own spread: no bound is nearer to 0


def bound_of(values: Tensor) -> Tensor:
    """The most that any of `values` [E, ..] may count for, float64 [..]: E times their median."""
    return len(values) * values.double().quantile(0.5, dim=0)


def bounded_means(means: Tensor, least: float = 0.0) -> Tensor:
    """`means` [E, n], each moved towards the median until its distance is within its bound.

    No bound is below `least`: where most experts share a task their distances are next to nothing,
    and another task's mean must not be moved onto theirs.
    """
    exact = means.double()
    middle = exact.quantile(0.5, dim=0)
    away = exact - middle
    distance = away.norm(dim=1, keepdim=True)
    bound = bound_of(distance).clamp(min=least)
    nearer = middle + away * (bound / distance.clamp(min=torch.finfo(torch.float64).tiny))
    return torch.where(distance > bound, nearer.to(means.dtype), means)


def bounded_variances(means: Tensor, factor: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """`factor` [E, f, d] and `rest` [E, d], float64, of covariances that are within their bounds.

    A row of `factor` is bounded by the variances of the pool's experts along that row, an entry of
    `rest` by their variances in that coordinate. `means` [E, d] are the experts', bounded.
    """
    least = SMALLEST * (means - means.mean(dim=0)).square().mean()
    own = factor.square().sum(dim=2)  # [E, f]
    unit = torch.nn.functional.normalize(factor, dim=2)
    some = torch.linspace(0, len(factor) - 1, min(len(factor), COMPARED)).round().long()
    bounds = [_along(rows, factor[some], rest[some]) for rows in unit]
    bound = VARIED * len(factor) * torch.stack(bounds) + least
    variances = factor.square().sum(dim=1) + rest
    within = torch.minimum(rest, VARIED * bound_of(variances) + least)
    over = own > bound
    shrunk = factor * (bound / own.where(over, bound)).sqrt()[:, :, None]
    return torch.where(over[:, :, None], shrunk, factor), within


def _along(rows: Tensor, factor: Tensor, rest: Tensor) -> Tensor:
    """The median over experts [E, ..] of their variance along each of `rows` [f, d]."""
    along = (factor @ rows.T).square().sum(dim=1) + rest @ rows.T.square()  # [E, f]
    return along.quantile(0.5, dim=0)
