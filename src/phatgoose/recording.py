"""What a routed model decided, token by token: filled by `record` for a text at a time.

Datasets are tallied instead (`phatgoose.analysis`), in memory that does not grow with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .sites import Site, Stream

__all__ = ["Recording", "SitePass", "Watcher"]


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
