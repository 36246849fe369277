"""What a routed model decided, token by token: filled by `record` for a text at a time.

Datasets are tallied instead (`phatgoose.analysis`), in memory that does not grow with them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base.sites import Site, Stream
from ..base.token_masks import TokenMasks, token_masks

__all__ = ["Recording", "SitePass", "Watch", "Watcher", "unwatched", "watches_over", "watching"]


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
        none = torch.zeros(len(self.experts), pool_size)
        return none.scatter_add_(1, self.experts.cpu(), self.weights.detach().float().cpu())

    def is_real(self) -> Tensor:
        """The mask of real tokens, bool, in the shape of `grid`."""
        if self.real is None:
            return torch.ones(tuple(self.grid), dtype=torch.bool)
        return self.real.cpu().bool()


Watcher = Callable[[SitePass], None]


@dataclass(frozen=True)
class Watch:
    """Who is told what the layers at the sites of one model decide, and what they know of masks."""

    layers: Mapping[str, nn.Module]
    watcher: Watcher
    masks: TokenMasks

    def tell(
        self,
        site: Site,
        u: Tensor,
        experts: Tensor,
        weights: Tensor,
        distribution: Callable[[], Tensor],
    ) -> None:
        """What was decided about the tokens of u [.., n]: `experts` and `weights`, each [T, k]."""
        real = self.masks.real_tokens(u, site.stream)
        if real is not None:
            weights = weights * real.reshape(-1, 1)
        grid = self.masks.grid(u, site.stream)
        self.watcher(SitePass(site, experts, weights, real, grid, distribution))


class _Uncompiled:
    """While anybody is inside, in any thread, compiled models run as they are written."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
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
    """The watches over `layer` at `site` that this context has opened, outermost first.

    A compiled pass is watched by nobody: while anybody watches, models run as they are written.
    """
    if torch.compiler.is_compiling():
        return []
    return [watch for watch in _WATCHES.get() if watch.layers.get(site.name) is layer]


@contextmanager
def watching(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], watcher: Watcher
) -> Iterator[None]:
    """Tell `watcher` what the `layers` of `model`, by site, decide in this context until it closes.

    What other threads have the model do is theirs. Compiled models run uncompiled meanwhile.
    """
    with token_masks(model) as masks, _UNCOMPILED:
        before = _WATCHES.set((*_WATCHES.get(), Watch(layers, watcher, masks)))
        try:
            yield
        finally:
            _WATCHES.reset(before)


@contextmanager
def unwatched() -> Iterator[None]:
    """While the context is open, nobody is told what this context's passes decide."""
    before = _WATCHES.set(())
    try:
        yield
    finally:
        _WATCHES.reset(before)


@dataclass
class Recording:
    """Routing decisions by site, in the order in which tokens passed.

    `weights[site]` is a list with one float32 tensor per forward pass, [rows, tokens, E], zero for
    experts not chosen; `real[site]` likewise the masks of real tokens, [rows, tokens].
    """

    experts: tuple[str, ...]
    weights: dict[str, list[Tensor]] = field(default_factory=dict)
    real: dict[str, list[Tensor]] = field(default_factory=dict)
    streams: dict[str, Stream] = field(default_factory=dict)

    def add(self, passed: SitePass) -> None:
        """Take in one pass through one site."""
        site, dense = passed.site, passed.dense_weights(len(self.experts))
        self.streams[site.name] = site.stream
        self.weights.setdefault(site.name, []).append(dense.view(*passed.grid, -1))
        self.real.setdefault(site.name, []).append(passed.is_real())

    def usage(self) -> dict[str, Tensor]:
        """Mean weight of each expert over all real tokens, [E] by site (METHOD section 7)."""
        means = {}
        for site, passes in self.weights.items():
            tokens = [w[mask] for w, mask in zip(passes, self.real[site], strict=True)]
            means[site] = torch.cat(tokens).mean(dim=0)
        return means

    def by_token(self, row: int = 0) -> Tensor:
        """Mean weight of each expert over all sites, [tokens, E], for one row of the batch.

        In an encoder-decoder model the sites of one stream are used: of the encoder or the decoder,
        whichever has more.
        """
        seen = list(self.streams.values())
        stream = "encoder" if seen.count("encoder") > seen.count("decoder") else "decoder"
        rows = [
            torch.cat([part[row] for part in passes])
            for site, passes in self.weights.items()
            if self.streams[site] == stream
        ]
        return torch.stack(rows).mean(dim=0)
