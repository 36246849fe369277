"""One text, token by token: which experts served it at every site, small enough for a web page.

docs/analysis.md has the JSON form ("Traces"), which the token explorer of the report reads.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ..base import texts_of
from ..routing.choice import ALONE, Choice
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

Array = NDArray[np.float64]

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
        shape = (1, *self.experts.shape[1:])
        no_expert = {"experts": np.zeros(shape, np.uint16), "weights": np.zeros(shape, np.uint8)}
        return replace(self, tokens=(token,), parts=(part,), **no_expert)  # type: ignore[arg-type]

    def tokens_dict(self) -> dict[str, Any]:
        """The tokens alone, as plain data that the token explorer can append."""

        def base64(array: NDArray[Any]) -> str:
            return b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")

        return {
            "tokens": list(self.tokens),
            "parts": list(self.parts),
            "experts": base64(self.experts.astype("<u2")),
            "weights": base64(self.weights),
        }

    def to_dict(self) -> dict[str, Any]:
        layers, kinds = layers_and_kinds(self.sites)
        return {
            "name": self.name,
            "layers": layers,
            "kinds": kinds,
            "sites": [[layers.index(s.layer_name), kinds.index(s.kind)] for s in self.sites],
            "kept": int(self.experts.shape[2]),
            "is_cut": self.is_cut,
            **self.tokens_dict(),
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

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": "phatgoose-trace-1",
            "router": self.router,
            "experts": list(self.experts),
            "parts": list(PARTS),
            "whole": [[expert, round(weight, 4)] for expert, weight in self.whole],
            "streams": [stream.to_dict() for stream in self.streams],
        }


def join_streams(parts: Iterable[TraceStream]) -> list[TraceStream]:
    """The streams in `parts`; those of one name are joined, their tokens in order."""
    by_name: dict[str, list[TraceStream]] = {}
    for part in parts:
        by_name.setdefault(part.name, []).append(part)
    return [
        replace(
            same[0],
            tokens=tuple(token for part in same for token in part.tokens),
            parts=tuple(number for part in same for number in part.parts),
            experts=np.concatenate([part.experts for part in same]),
            weights=np.concatenate([part.weights for part in same]),
        )
        for same in by_name.values()
    ]


def trace(model: PreTrainedModel, encoder: Encoder, pair: TokenPair) -> Trace:
    """The trace of a prompt and the answer after it through the routed `model`, in one pass."""
    parts, keeper = composition_of(model), TraceKeeper()
    pass_through(model, encoder, [pair], lambda passed, _: keeper.add(passed))
    passed = keeper.streams()
    streams = (
        passed[name].some(slice(None), texts_of(encoder.tokenizer, tokens), marks)
        for name, (tokens, marks) in streams_of(model, pair).items()
        if name in passed
    )
    whole = chosen_for_whole(parts, parts.context.choice if parts.context else None)
    return Trace(parts.experts, parts.routing.router, tuple(streams), whole)


def chosen_for_whole(parts: Composition, choice: Choice | None) -> tuple[tuple[str, float], ...]:
    """A trace's `whole`, where the model's context has this `choice` for one text."""
    return tuple(
        item for row in chosen_for_prompts(parts, choice) for item in (row or ALONE).items()
    )


class TraceKeeper:
    """Keeps the experts of greatest weight at each site, from one pass of one row or many."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[str, Tensor, Tensor, bool]]] = {}

    def add(self, passed: SitePass) -> None:
        site, weights = passed.site, passed.weights.detach().float().cpu()
        kept = highest(weights, min(MOST_KEPT, weights.shape[1]))
        best, shares = passed.experts.cpu().gather(1, kept), weights.gather(1, kept)
        is_cut = weights.shape[1] > MOST_KEPT
        self._seen.setdefault(site.stream, []).append((site.name, best, shares, is_cut))

    def streams(self) -> dict[str, TraceStream]:
        """The streams that were passed; `TraceStream.some` adds texts and parts."""
        return {name: self._stream(name) for name in self._seen}

    def _stream(self, name: str) -> TraceStream:
        tokens = max(len(best) for _, best, _, _ in self._seen[name])
        # Sites inside a mixture of experts of the base's own see some of the tokens only.
        seen = [each for each in self._seen[name] if len(each[1]) == tokens]
        shape = (tokens, len(seen), max(best.shape[1] for _, best, _, _ in seen))
        experts, shares = np.zeros(shape, np.uint16), np.zeros(shape)
        for index, (_, best, weights, _) in enumerate(seen):
            experts[:, index, : best.shape[1]] = best.numpy()
            shares[:, index, : best.shape[1]] = weights.numpy()
        sites = tuple(site_label(site) for site, _, _, _ in seen)
        is_cut = any(is_cut for _, _, _, is_cut in seen)
        return TraceStream(name, (), (), sites, experts, _in_bytes(shares), is_cut)


def _in_bytes(shares: NDArray[Any]) -> NDArray[np.uint8]:
    """Shares [.., k] in 255ths whose sum is the rounded sum of the shares, 1 at most.

    A mixture of one's own may have others: sizes count, scaled down to a sum of 1.
    """
    shares = np.abs(shares)
    shares = shares / np.maximum(1, shares.sum(axis=-1, keepdims=True))
    # Running sums are rounded, so that no share is off by more than one.
    sums = np.rint(np.cumsum(shares, axis=-1).clip(0, 1) * FULL).astype(int)
    return np.asarray(np.diff(sums, axis=-1, prepend=0), np.uint8)
