"""Watching a routed model: callbacks for what its layers decide, and recordings of all of it.

For whole datasets `analysis.distribution` sums decisions up in constant memory.
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

from ..experts.sums import dense_weights
from ..passes import TokenMasks, in_context, token_masks
from ..sites import ROUTED, Site, Stream


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
        return dense_weights(self.experts.cpu(), self.weights.detach().float().cpu(), pool_size)

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
    """While anybody is inside, nothing is compiled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

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
def watch(model: PreTrainedModel, callback: OnSitePass) -> Iterator[None]:
    """Call `callback` for each decision of routed `model` in this thread; nothing is compiled."""
    layers = getattr(model, ROUTED).layers
    with (
        _UNCOMPILED,
        token_masks(model) as masks,
        in_context(_WATCHES, (*_WATCHES.get(), Watch(layers, callback, masks))),
    ):
        yield


@contextmanager
def record(model: PreTrainedModel) -> Iterator[Recording]:
    """A `Recording` that fills with every decision of the routed `model` while the context is open.

    Only calls of this thread are recorded.
    """
    recording = Recording(getattr(model, ROUTED).experts)
    with watch(model, recording.add):
        yield recording


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
        site = passed.site
        dense = passed.dense_weights(len(self.experts))
        self.streams[site.name] = site.stream
        self.weights.setdefault(site.name, []).append(dense.view(*passed.grid, -1))
        self.real.setdefault(site.name, []).append(passed.is_real())

    def usage(self) -> dict[str, Tensor]:
        """Mean weight of each expert over all real tokens, [E] by site (paper, section 4.4).

        Empty if nothing was recorded.
        """
        means = {}
        for site, passes in self.weights.items():
            real = torch.cat([mask.flatten() for mask in self.real[site]])
            weights = torch.cat([dense.flatten(0, -2) for dense in passes])
            means[site] = weights[real].mean(dim=0)
        return means

    def by_token(self, row: int = 0) -> Tensor:
        """Mean weight of each expert over all sites, [tokens, E], for one row of the batch.

        Of an encoder-decoder model the decoder's tokens and sites, if experts act there. No tokens
        if nothing was recorded.
        """
        return torch.stack(self._rows(self.weights, row, len(self.experts))).mean(dim=0)

    def summary(self, row: int = 0) -> dict[str, float]:
        """Each used expert's share of the tokens of one row of the batch, by name, greatest first.

        Over the tokens and sites of `by_token`, without padding.
        """
        return summary_of(self.experts, self.by_token(row)[self._rows(self.real, row)[0].bool()])

    def _rows(self, by_site: Mapping[str, list[Tensor]], row: int, *sizes: int) -> list[Tensor]:
        """What `by_site` has of one row's tokens, of the sites that see all tokens, in rows."""
        stream = "decoder" if "decoder" in self.streams.values() else "encoder"
        rows = []
        for site, passes in by_site.items():
            has_rows = all(real.dim() == 2 for real in self.real[site])
            if has_rows and self.streams[site] == stream:
                rows.append(torch.cat([tokens[row] for tokens in passes]))
        longest = max(map(len, rows), default=0)
        return [tokens for tokens in rows if len(tokens) == longest] or [torch.zeros(0, *sizes)]


def summary_of(experts: Sequence[str], shares: Tensor) -> dict[str, float]:
    """Each used expert's mean share, greatest first, of tokens' `shares` [T, E].

    Tokens on which no expert acts don't count.
    """
    total = shares.sum(dim=0) / shares.any(dim=-1).sum().clamp(min=1)
    best = total.sort(descending=True, stable=True)
    rounded = {}
    for z, share in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        if round(share, 4):
            rounded[experts[z]] = round(share, 4)
    return rounded
