"""Watching a routed model: callbacks for what its layers decide."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..experts.kind import dense_weights
from ..passes import TokenMasks, token_masks
from ..sites import Site


@dataclass(frozen=True)
class SitePass:
    """T tokens that passed one routed site, and what was decided about them.

    `experts` [T, k] are indices into the pool, `weights` [T, k] theirs, 0 for padding. `grid` is
    the shape that the tokens came in, mostly (rows, tokens), and `real` the mask of real tokens in
    that shape, None when all are. `distribution()` gives the probabilities before top-k of the
    experts that act at the site, [T, E].
    """

    site: Site
    experts: Tensor
    weights: Tensor
    real: Tensor | None
    grid: Sequence[int]
    distribution: Callable[[], Tensor]

    def dense_weights(self, pool_size: int) -> Tensor:
        """The weight of every expert of the pool, float32 [T, pool_size], 0 if not chosen."""
        weights = self.weights.detach().float().cpu()
        return dense_weights(self.experts.cpu(), weights, pool_size)

    def is_real(self) -> Tensor:
        if self.real is None:
            return torch.ones(tuple(self.grid), dtype=torch.bool)
        return self.real.cpu().bool()


OnSitePass = Callable[[SitePass], None]  # a callback


@dataclass(frozen=True)
class Watch:
    """A callback for the decisions of one model's layers, which are given by site."""

    layers: Mapping[str, nn.Module]
    callback: OnSitePass
    masks: TokenMasks

    def tell(
        self,
        site: Site,
        u: Tensor,
        experts: Tensor,
        weights: Tensor,
        distribution: Callable[[], Tensor],
    ) -> None:
        """Call back with a decision about u [.., n]: `experts` and `weights`, each [T, k]."""
        real = self.masks.real_tokens(u, site.stream)
        if real is not None:
            weights = weights * real.reshape(-1, 1)
        grid = self.masks.grid(u, site.stream)
        self.callback(SitePass(site, experts, weights, real, grid, distribution))


class _Uncompiled:
    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                # The stance is the process's, hence the count: the last one out restores it.
                self._stance = torch.compiler.set_stance("force_eager")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stance.__exit__(None, None, None)


_UNCOMPILED = _Uncompiled()
_WATCHES: ContextVar[tuple[Watch, ...]] = ContextVar("watches", default=())


def watches_over(layer: nn.Module, site: Site) -> list[Watch]:
    """The open watches over `layer` at `site`, outermost first; none during compilation."""
    # While a watch is open, models run uncompiled.
    if torch.compiler.is_compiling():
        return []
    return [watch for watch in _WATCHES.get() if watch.layers.get(site.name) is layer]


@contextmanager
def watching(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], callback: OnSitePass
) -> Iterator[None]:
    """Call `callback` for every decision of the `layers` of `model` (by site) in this context."""
    with token_masks(model) as masks, _UNCOMPILED:
        before = _WATCHES.set((*_WATCHES.get(), Watch(layers, callback, masks)))
        try:
            yield
        finally:
            _WATCHES.reset(before)


@contextmanager
def unwatched() -> Iterator[None]:
    """Close all watches of this context for a while."""
    before = _WATCHES.set(())
    try:
        yield
    finally:
        _WATCHES.reset(before)
