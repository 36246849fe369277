"""What a routed model decided, token by token: filled by `record` for a text at a time.

Datasets are tallied instead (`phatgoose.analysis`), in memory that does not grow with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .sites import Site, Stream

__all__ = ["Recording", "Watcher"]

# (site, experts [T, k], weights [T, k], mask of real tokens or None, shape of the token grid, what
# gives the probabilities [T, E] of the site's experts before top-k)
Watcher = Callable[
    [Site, Tensor, Tensor, "Tensor | None", Sequence[int], Callable[[], Tensor]], None
]


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

    def add(
        self,
        site: Site,
        experts: Tensor,
        weights: Tensor,
        real: Tensor | None,
        grid: Sequence[int],
        _: Callable[[], Tensor],
    ) -> None:
        """Take in one pass through one site."""
        dense = torch.zeros(len(experts), len(self.experts))
        dense.scatter_add_(1, experts.cpu(), weights.detach().float().cpu())
        mask = torch.ones(tuple(grid), dtype=torch.bool) if real is None else real.cpu()
        self.streams[site.name] = site.stream
        self.weights.setdefault(site.name, []).append(dense.view(*grid, -1))
        self.real.setdefault(site.name, []).append(mask)

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
