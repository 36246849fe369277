"""Prompts that the base reads once for many models, whose experts act from prompts' ends on.

Such experts leave the body of a prompt to the base (`base.active_tokens`). So its keys and values,
read once, serve the base itself, every expert alone and every router over them: each goes on where
its experts begin to act. The same reading has the states that some routers choose by.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..base.active_tokens import beginnings
from ..experts.readings import PromptStates
from ..routing.composition import composition_if_any
from ..routing.context import base_alone
from ..routing.routers.discriminant import States, remember_states
from ..tasks.batching import can_pack, pad_left, pad_right
from ..tasks.prompt_passes import PromptReading, keeping_caches, read_prompts

Tokens = Sequence[int]
Cache = Any  # a DynamicCache; transformers has no types for mypy
MOST_BYTES = 1 << 30  # of keys and values: 46,000 tokens of SmolLM2-135M in bfloat16


@dataclass(frozen=True)
class Begun:
    """Prompts whose first tokens were read: `counts` [rows] of each, on the left of `cache`.

    `columns` are those of the cache; where a row has fewer tokens the last ones are void.
    """

    cache: Cache
    counts: tuple[int, ...]

    @property
    def columns(self) -> int:
        return max(self.counts)

    @property
    def seen(self) -> Tensor:
        """Which columns hold the rows' tokens, [rows, columns]."""
        return torch.arange(self.columns) < torch.tensor(self.counts)[:, None]

    def only(self, rows: Sequence[int]) -> Begun:
        """The prompts of these rows alone; of some rows the cache is a copy."""
        if list(rows) == list(range(len(self.counts))):
            return self
        counts = tuple(self.counts[row] for row in rows)
        return Begun(_part(self.cache, max(counts), rows), counts)

    def laid_out(self, prompts: Sequence[Tokens], pad: int) -> tuple[Tensor, Tensor]:
        """(ids, mask) of the whole `prompts`, [rows, tokens]; what was read is in its columns."""
        parts = [
            (row[:count], row[count:]) for row, count in zip(prompts, self.counts, strict=True)
        ]
        ids = torch.cat(
            [pad_right([a for a, _ in parts], pad), pad_left([b for _, b in parts], pad)], 1
        )
        rest = pad_left([[1] * len(b) for _, b in parts], 0)
        return ids, torch.cat([self.seen.long(), rest], dim=1)


class SharedPrompts:
    """Keys, values and hidden states of prompts: read once by the base, and used by all models.

    A batch that found no room is read again, alike: results don't depend on what is kept. Without
    `tails` no model goes on from there, and only `states` are shared. `wants_states` says that some
    router will ask for them.
    """

    def __init__(self, *, tails: bool, wants_states: bool = False) -> None:
        self.tails, self.wants_states = tails, wants_states
        self.states: States = {}
        self._held: dict[tuple[tuple[int, ...], ...], Cache] = {}
        self._bytes = 0

    @staticmethod
    def most_tokens(model: PreTrainedModel) -> int:
        """How many tokens' keys and values there is room for."""
        caches: list[Cache] = []
        with base_alone(model), keeping_caches(lambda _, cache, __: caches.append(cache)):
            read_prompts(model, [[0]], _Nothing())
        return MOST_BYTES // _size(caches[0])

    def serve(self, model: PreTrainedModel) -> bool:
        """Whether `model`, routed or not, can go on where the base has read."""
        parts = composition_if_any(model)
        return self.tails and can_pack(model) and (parts is None or parts.all_at_ends)

    def begin(self, model: PreTrainedModel, prompts: Sequence[Tokens]) -> Begun:
        """The `prompts`, a batch, as far as no expert of `model` acts, but for one token at least.

        The cache may be added to.
        """
        cache, parts = self._read(model, prompts), composition_if_any(model)
        counts = torch.tensor([len(prompt) - 1 for prompt in prompts])
        if parts is not None and parts.context is not None:
            acting = beginnings(parts.context.acting, prompts)
            counts = torch.minimum(counts, acting.min(dim=1).values)
        return Begun(_part(cache, int(counts.max())), tuple(counts.tolist()))

    def read_ahead(self, model: PreTrainedModel, batches: Sequence[Sequence[Tokens]]) -> None:
        """Read `batches`, so that a router needn't read its prompts itself."""
        for batch in batches:
            if any(tuple(prompt) not in self.states for prompt in batch):
                self._read(model, batch)

    def _read(self, model: PreTrainedModel, prompts: Sequence[Tokens]) -> Cache:
        key = tuple(map(tuple, prompts))
        if key in self._held:
            return self._held[key]
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
        caches: list[Cache] = []
        reading = PromptStates(model) if self.wants_states else _Nothing()
        with base_alone(model), keeping_caches(lambda _, cache, __: caches.append(cache)):
            rows = [prompts[row] for row in order]
            states = read_prompts(model, rows, reading, budget=sys.maxsize)
        if self.wants_states:
            remember_states(self.states, rows, states)
        (cache,) = caches
        cache.batch_select_indices(torch.tensor(order).argsort())
        size = _size(cache)
        if self._bytes + size <= MOST_BYTES:
            self._held[key] = cache
            self._bytes += size
        return cache


@contextmanager
def reading_once(model: PreTrainedModel) -> Iterator[SharedPrompts | None]:
    """One pass over each prompt, for both the router of `model` and its answer.

    Yields None for models that can't share it: their router doesn't go by prompt statistics, or
    some of their experts act on all tokens.
    """
    parts, shared = composition_if_any(model), SharedPrompts(tails=True, wants_states=True)
    goes_by_it = parts is not None and "readings" in parts.router.spec.needs
    router = parts.prompt_router if parts is not None and goes_by_it else None
    if router is None or not shared.serve(model):
        yield None
    else:
        router.remember(shared.states)
        try:
            yield shared
        finally:
            router.remember(None)


def _part(cache: Cache, columns: int, rows: Sequence[int] | slice = slice(None)) -> Cache:
    """The first columns of `cache`, of all rows or of some."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in part.layers:
        layer.keys = layer.keys[rows, :, :columns]
        layer.values = layer.values[rows, :, :columns]
    return part


def _size(cache: Cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


class _Nothing(PromptReading):
    def begin(self, mask: Tensor) -> None:
        self._rows = len(mask)

    def found(self) -> Tensor:
        return torch.empty(self._rows, 0)
