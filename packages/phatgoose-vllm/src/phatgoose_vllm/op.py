"""The custom operator of routed layers inside vLLM: choose experts, add their updates.

torch.compile and CUDA graphs see one node, `phatgoose::add_routed`, in which nothing waits for the
device. Its tensors are arguments, so that all layers of a model have the same graph; what isn't a
tensor (router, kernel, which outputs) is in a table of this process, and the argument `update` is a
place in it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phatgoose.routing.kernels import choose_kernel, one_call
from phatgoose.routing.routers.router import Router, RoutingDecision, highest, products

FACTORS = ("A", "B")  # of one site's tensors the last ones

Reduce = Callable[[Tensor], Tensor]


class SiteUpdate(NamedTuple):
    """What is added to the outputs from `first` on, `width` of them.

    Its tensors are those of `names`, the router's own, then A and B. `numbers` are what else a
    `RouterAtSite` has: k, E, eps and pool_size.
    """

    router: Router
    numbers: Mapping[str, Any]
    names: tuple[str, ...]
    first: int
    width: int

    def add(self, y: Tensor, u: Tensor, tensors: Sequence[Tensor], over: Split | None) -> None:
        """Add to y [T, width], contiguous, in place, what the experts of u [T, n'] come to."""
        *state, A, B = tensors
        tensors_here = dict(zip(self.names, state, strict=True))
        at_site: Any = SimpleNamespace(**self.numbers, **tensors_here)
        u = u.to(A.dtype)
        if over is None and self.router.fused:
            stacked = (at_site.vectors, A, B)
            add_routed = one_call(self.router.kernel, y, u, stacked, at_site.k)
            if add_routed is not None:
                add_routed(y, u, stacked, at_site.k, at_site.eps)
                return
        chooser = over or self.router
        decision = chooser.decision(u, at_site)
        kernel = choose_kernel(self.router.kernel, u, decision.experts, A, B)
        y.add_(kernel(u, decision.experts, decision.weights, A, B))


class Split(NamedTuple):
    """A layer whose `inputs` are split over processes; `reduce` adds a tensor of all of them up.

    The experts' products need no sum of their own: they join the layer's.
    """

    inputs: int
    reduce: Reduce

    def decision(self, u: Tensor, at_site: Any) -> RoutingDecision:
        """What router phatgoose decides by all inputs, of which u [T, n'] is the share here.

        Summed are v̄ᵀu, Σ u and Σ u², in float64, in which a mean may be far above deviations.
        """
        exact = u.double()
        moments = (exact.sum(-1, keepdim=True), exact.square().sum(-1, keepdim=True))
        sums = self.reduce(torch.cat([products(u, at_site.vectors).double(), *moments], dim=-1))
        product, first, second = torch.split(sums, [sums.shape[-1] - 2, 1, 1], dim=-1)
        variance = (second / self.inputs - (first / self.inputs).square()).clamp(min=0)
        scores = (product / ((variance + at_site.eps) * self.inputs).sqrt()).float()
        experts = highest(scores, at_site.k)
        return RoutingDecision(experts, scores.gather(-1, experts).softmax(dim=-1))


class LayerUpdate(NamedTuple):
    """The updates of all sites that a layer packs."""

    sites: tuple[SiteUpdate, ...]
    split: Split | None = None

    def add(self, y: Tensor, u: Tensor, tensors: Sequence[Tensor]) -> None:
        tokens = u.reshape(-1, u.shape[-1])
        rows = y.view(-1, y.shape[-1])
        begin = 0
        for site in self.sites:
            end = begin + len(site.names) + len(FACTORS)
            outputs = rows[:, site.first : site.first + site.width]
            # Kernels add to rows without gaps; in a packed layer a part is copied there and back.
            part = outputs.contiguous()
            site.add(part, tokens, tensors[begin:end], self.split)
            if part.data_ptr() != outputs.data_ptr():
                outputs.copy_(part)
            begin = end


_updates: list[LayerUpdate] = []
_places: dict[Hashable, int] = {}


def place_of_update(key: Hashable, update: LayerUpdate) -> int:
    """The place in the table of an update that `key` says all about."""
    if key not in _places:
        _updates.append(update)
        _places[key] = len(_updates) - 1
    return _places[key]


torch.library.define(
    "phatgoose::add_routed", "(Tensor(a!) y, Tensor u, Tensor[] tensors, int update) -> ()"
)


@torch.library.impl("phatgoose::add_routed", ("cpu", "cuda"))
def _add_routed(y: Tensor, u: Tensor, tensors: Sequence[Tensor], update: int) -> None:
    _updates[update].add(y, u, tensors)


@torch.library.register_fake("phatgoose::add_routed")  # type: ignore[untyped-decorator]
def _nothing(y: Tensor, u: Tensor, tensors: Sequence[Tensor], update: int) -> None:
    return None


def add_routed(y: Tensor, u: Tensor, tensors: Sequence[Tensor], update: int) -> None:
    """Add to y [.., d] in place what the update at this place in the table comes to for u [.., n].

    `tensors` are those of its sites, one after the other: the router's, A and B.
    """
    torch.ops.phatgoose.add_routed(y, u, list(tensors), update)
