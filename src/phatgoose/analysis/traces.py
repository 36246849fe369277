"""One text, token by token: which experts served it at every site, small enough for a web page.

docs/analysis.md has the JSON form ("Traces"), which the token explorer of the report reads.
"""

from __future__ import annotations

from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ..base.detokenising import texts_of
from ..routing.choice import BASE_ALONE, Choice
from ..routing.compose import Composition, composition_of
from ..routing.recording import SitePass
from ..routing.routers.router import highest
from ..tasks.encoding import Encoder, TokenPair
from .distribution import (
    PARTS,
    SiteLabel,
    chosen_for_prompts,
    layers_and_kinds,
    pass_through,
    site_label,
    streams_of,
)
from .measures import Array

MOST_KEPT = 8  # experts kept per token and site; the others' weight is kept as a sum
FULL = 255  # the whole weight of a token, in a byte


@dataclass(frozen=True)
class TraceStream:
    """The tokens that pass one stack of a model, or all tokens of a model with one.

    `parts` are 0 for tokens of the prompt and 1 for the answer's. `experts` [T, S, k] are indices
    of the heaviest experts at each of the `sites`, best first, `weights` [T, S, k] their weights in
    255ths. What these lack of 255 belongs to experts that were cut off (`is_cut`), or to none.
    """

    name: str
    tokens: tuple[str, ...]
    parts: tuple[int, ...]
    sites: tuple[SiteLabel, ...]
    experts: NDArray[np.uint16]
    weights: NDArray[np.uint8]
    is_cut: bool = False

    def shares(self, pool_size: int) -> Array:
        """Mean weight of each expert over the sites, [T, E]."""
        dense = np.zeros((len(self.tokens), pool_size))
        rows = np.arange(len(self.tokens))[:, None, None]
        np.add.at(dense, (rows, self.experts), self.weights / FULL)
        return dense / len(self.sites)

    def some(self, chosen: slice, tokens: Sequence[str], parts: Sequence[int]) -> TraceStream:
        return replace(
            self,
            tokens=tuple(tokens),
            parts=tuple(parts),
            experts=self.experts[chosen],
            weights=self.weights[chosen],
        )

    def without_experts(self, token: str, part: int) -> TraceStream:
        return replace(
            self,
            tokens=(token,),
            parts=(part,),
            experts=np.zeros_like(self.experts[:1]),
            weights=np.zeros_like(self.weights[:1]),
        )

    def to_dict(self) -> dict[str, object]:
        layers, kinds = layers_and_kinds(self.sites)
        sites = []
        for site in self.sites:
            sites.append([layers.index(site.layer_name), kinds.index(site.kind)])
        return {
            "name": self.name,
            "layers": layers,
            "kinds": kinds,
            "sites": sites,
            "kept": int(self.experts.shape[2]),
            "is_cut": self.is_cut,
            "tokens": self.tokens,
            "parts": self.parts,
            "experts": b64encode(self.experts.astype("<u2").tobytes()).decode(),
            "weights": b64encode(self.weights.tobytes()).decode(),
        }


@dataclass(frozen=True)
class Trace:
    """Which experts served the tokens of one text.

    `whole` are those chosen or shortlisted for the whole text with their weights, if any, best
    first.
    """

    experts: tuple[str, ...]
    router: str
    streams: tuple[TraceStream, ...]
    whole: tuple[tuple[str, float], ...] = ()

    def to_dict(self) -> dict[str, object]:
        return {
            "format": "phatgoose-trace-1",
            "router": self.router,
            "experts": self.experts,
            "parts": PARTS,
            "whole": [[expert, round(weight, 4)] for expert, weight in self.whole],
            "streams": [stream.to_dict() for stream in self.streams],
        }


def join_streams(parts: Iterable[TraceStream]) -> list[TraceStream]:
    """The streams in `parts`; those of one name are joined, their tokens in order."""
    by_name: dict[str, list[TraceStream]] = {}
    for part in parts:
        by_name.setdefault(part.name, []).append(part)
    joined = []
    for pieces in by_name.values():
        tokens: list[str] = []
        kinds: list[int] = []
        for piece in pieces:
            tokens += piece.tokens
            kinds += piece.parts
        experts = np.concatenate([piece.experts for piece in pieces])
        weights = np.concatenate([piece.weights for piece in pieces])
        stream = replace(
            pieces[0], tokens=tuple(tokens), parts=tuple(kinds), experts=experts, weights=weights
        )
        joined.append(stream)
    return joined


def trace(model: PreTrainedModel, encoder: Encoder, pair: TokenPair) -> Trace:
    """The trace of a prompt and the answer after it through the routed `model`, in one pass."""
    parts = composition_of(model)
    keeper = TraceKeeper()
    pass_through(model, encoder, [pair], lambda passed, _: keeper.add(passed))
    passed = keeper.streams()
    streams = []
    for name, (tokens, marks) in streams_of(model, pair).items():
        if name in passed:
            texts = texts_of(encoder.tokenizer, tokens)
            streams.append(passed[name].some(slice(None), texts, marks))
    choice = parts.context.choice if parts.context else None
    chosen = chosen_for_whole(parts, choice)
    return Trace(parts.experts, parts.routing.router, tuple(streams), chosen)


def chosen_for_whole(parts: Composition, choice: Choice | None) -> tuple[tuple[str, float], ...]:
    """A trace's `whole`, where the model's context has this `choice` for one text."""
    chosen = list[tuple[str, float]]()
    for weights in chosen_for_prompts(parts, choice):
        chosen += (weights or BASE_ALONE).items()
    return tuple(chosen)


class TraceKeeper:
    """Keeps the experts of greatest weight at each site, from one pass of one row or many."""

    def __init__(self) -> None:
        self._sites = defaultdict[str, list[_SiteTrace]](list)

    def add(self, passed: SitePass) -> None:
        weights = passed.weights.detach().float().cpu()
        k = weights.shape[1]
        kept = highest(weights, min(MOST_KEPT, k))
        experts = passed.experts.cpu().gather(1, kept)
        site = _SiteTrace(passed.site.name, experts, weights.gather(1, kept), k > MOST_KEPT)
        self._sites[passed.site.stream].append(site)

    def streams(self) -> dict[str, TraceStream]:
        """The streams that were passed; `TraceStream.some` adds texts and parts."""
        return {name: _stream(name, sites) for name, sites in self._sites.items()}


class _SiteTrace(NamedTuple):
    name: str
    experts: Tensor  # [T, k], best first
    weights: Tensor  # theirs
    is_cut: bool


def _stream(name: str, sites: Sequence[_SiteTrace]) -> TraceStream:
    tokens = max(len(site.experts) for site in sites)
    # Sites inside a mixture of experts of the base's own see some of the tokens only.
    sites = [site for site in sites if len(site.experts) == tokens]
    shape = (tokens, len(sites), max(site.experts.shape[1] for site in sites))
    experts = np.zeros(shape, np.uint16)
    shares = np.zeros(shape)
    labels = []
    is_cut = False
    for index, site in enumerate(sites):
        k = site.experts.shape[1]
        experts[:, index, :k] = site.experts.numpy()
        shares[:, index, :k] = site.weights.numpy()
        labels.append(site_label(site.name))
        is_cut |= site.is_cut
    return TraceStream(name, (), (), tuple(labels), experts, _in_bytes(shares), is_cut)


def _in_bytes(shares: Array) -> NDArray[np.uint8]:
    """Shares [.., k] in 255ths whose sum is the rounded sum of the shares, 1 at most.

    A mixture of one's own may have others: sizes count, scaled down to a sum of 1.
    """
    shares = np.abs(shares)
    shares = shares / np.maximum(1, shares.sum(axis=-1, keepdims=True))
    # Running sums are rounded, so that no share is off by more than one.
    sums = np.rint(np.cumsum(shares, axis=-1).clip(0, 1) * FULL).astype(int)
    return np.asarray(np.diff(sums, axis=-1, prepend=0), np.uint8)
