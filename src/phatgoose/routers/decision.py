"""What every router answers: experts and weights for each token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["RoutingDecision"]


@dataclass(frozen=True)
class RoutingDecision:
    """The experts chosen for each of T tokens, best first where there is a best.

    `experts` [T, k] are rows of the site's stack, `weights` [T, k] float32. They sum to 1, or to
    less for looked-up and merged experts of which some do not act at the site. (`RoutedLinear`
    sets those of padding to 0.)
    """

    experts: Tensor
    weights: Tensor
