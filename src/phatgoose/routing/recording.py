"""Recordings: every decision of a routed model about a text, token by token.

For whole datasets `analysis.distribution` sums decisions up in constant memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import RoutingError
from ..sites import Stream
from .composition import composition_of
from .watching import OnSitePass, SitePass, watching


@contextmanager
def record(model: PreTrainedModel) -> Iterator[Recording]:
    """A `Recording` that fills with every routing decision of `model` while the context is open.

    Only calls of this thread are recorded. Raises RoutingError when `model` is not routed.
    """
    recording = Recording(composition_of(model).experts)
    with watch(model, recording.add):
        yield recording


@contextmanager
def watch(model: PreTrainedModel, callback: OnSitePass) -> Iterator[None]:
    """Call `callback` for each routing decision of `model` in this thread, uncompiled meanwhile."""
    with watching(model, composition_of(model).layers, callback):
        yield


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

    def __repr__(self) -> str:
        passes = max(map(len, self.weights.values()), default=0)
        sizes = f"passes: {passes}, sites: {len(self.weights)}, experts: {len(self.experts)}"
        return f"<Recording ({sizes})>"

    def add(self, passed: SitePass) -> None:
        site, dense = passed.site, passed.dense_weights(len(self.experts))
        self.streams[site.name] = site.stream
        self.weights.setdefault(site.name, []).append(dense.view(*passed.grid, -1))
        self.real.setdefault(site.name, []).append(passed.is_real())

    def usage(self) -> dict[str, Tensor]:
        """Mean weight of each expert over all real tokens, [E] by site (paper, section 4.4).

        Empty if nothing was recorded.
        """
        means = {}
        for site, passes in self.weights.items():
            tokens = [w[mask] for w, mask in zip(passes, self.real[site], strict=True)]
            means[site] = torch.cat(tokens).mean(dim=0)
        return means

    def by_token(self, row: int = 0) -> Tensor:
        """Mean weight of each expert over all sites, [tokens, E], for one row of the batch.

        Of an encoder-decoder model the decoder's tokens and sites, if experts act there.
        """
        return torch.stack(self._rows(self.weights, row)).mean(dim=0)

    def summary(self, row: int = 0) -> dict[str, float]:
        """Each used expert's share of the tokens of one row of the batch, by name, greatest first.

        Over the tokens and sites of `by_token`, without padding.
        """
        return summary_of(self.experts, self.by_token(row)[self._rows(self.real, row)[0]])

    def _rows(self, held: Mapping[str, list[Tensor]], row: int) -> list[Tensor]:
        """What is held of one row's tokens, by site; of the sites that see all tokens."""
        stream = "decoder" if "decoder" in self.streams.values() else "encoder"
        rows = [
            torch.cat([part[row] for part in passes])
            for site, passes in held.items()
            if self.streams[site] == stream
        ]
        if not rows:
            raise RoutingError("Nothing was recorded: no pass of the model ran meanwhile.")
        tokens = max(map(len, rows))
        return [each for each in rows if len(each) == tokens]


def summary_of(experts: Sequence[str], shares: Tensor) -> dict[str, float]:
    """Each used expert's mean share, greatest first, of tokens' `shares` [T, E].

    Tokens on which no expert acts don't count.
    """
    total = shares.sum(dim=0) / shares.any(dim=-1).sum().clamp(min=1)
    best = total.sort(descending=True, stable=True)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return {experts[z]: round(share, 4) for z, share in pairs if round(share, 4)}
