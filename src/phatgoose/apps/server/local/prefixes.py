"""Beginnings of prompts that were read before: their keys and values, for prompts that share them.

The next turn of a conversation begins as the one before, and prompts of one application begin with
the same instructions. What a prompt's tokens come to depends on who reads them: the base alone, or
some experts as one routing weighs them. Experts that act from a prompt's end on leave its body to
the base, so for them all one beginning is enough.

Each client has its own: how soon an answer comes would tell whether others have asked the same.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

Cache = Any  # a DynamicCache; transformers has no types for mypy
SHORTEST = 16  # tokens; fewer are read as fast as they are copied
MIB = 1 << 20


@dataclass(frozen=True)
class Reader:
    """Who reads a prompt: equal tokens have equal keys and values for equal `key`s, up to `limit`.

    `limit` is how many of the prompt's tokens this holds for, `client` who may share them.
    """

    key: Hashable
    limit: int
    client: str = ""

    @property
    def shelf(self) -> Hashable:
        return self.client, self.key


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt's first tokens [n] and each layer's keys and values, [heads, n, d] each.

    Only readers of its `shelf` may use it.
    """

    shelf: Hashable
    tokens: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def shared(self, tokens: Tensor) -> int:
        """How many of the first `tokens` are the same."""
        most = min(len(tokens), len(self.tokens))
        differ = (self.tokens[:most] != tokens[:most]).nonzero()
        return int(differ[0]) if len(differ) else most


class PrefixStore:
    """Prefixes within `most_bytes`; the least recently used leave first. For any thread."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self.tokens_reused = 0
        self._prefixes: list[Prefix] = []  # the most recently used last
        self._lock = threading.Lock()

    def find(self, reader: Reader, prompt: Sequence[int]) -> tuple[Prefix, int] | None:
        """The prefix that shares most of the first tokens, and how many; None for hardly any.

        One token is left to be read, since its logits are wanted.
        """
        tokens = torch.tensor(prompt[: min(reader.limit, len(prompt) - 1)])
        with self._lock:
            shared = [
                (each.shared(tokens), each) for each in self._prefixes if each.shelf == reader.shelf
            ]
            count, best = max(shared, key=lambda pair: pair[0], default=(0, None))
            if best is None or count < SHORTEST:
                return None
            self._prefixes.remove(best)
            self._prefixes.append(best)
            self.tokens_reused += count
        return best, count

    def keep(
        self, reader: Reader, tokens: Sequence[int], cache: Cache, row: int, mask: Tensor
    ) -> None:
        """Keep the first of `tokens`; `mask` [columns] is 1 at theirs in a row of `cache`."""
        count = min(reader.limit, len(tokens))
        if not self.most_bytes or count < SHORTEST or not can_keep(cache):
            return
        kept = torch.tensor(tokens[:count])
        with self._lock:
            if any(e.shelf == reader.shelf and e.shared(kept) == count for e in self._prefixes):
                return
        columns = mask.nonzero()[:count, 0]
        layers = tuple(
            (each.keys[row].index_select(1, columns), each.values[row].index_select(1, columns))
            for each in cache.layers
        )
        new = Prefix(reader.shelf, kept, layers)
        if new.nbytes > self.most_bytes:
            return
        with self._lock:
            # What the new one begins with is in it.
            short = [
                each
                for each in self._prefixes
                if each.shelf == new.shelf and each.shared(kept) == len(each.tokens)
            ]
            self._prefixes = [each for each in self._prefixes if each not in short] + [new]
            self.bytes += new.nbytes - sum(each.nbytes for each in short)
            while self.bytes > self.most_bytes:
                self.bytes -= self._prefixes.pop(0).nbytes


def can_keep(cache: Cache) -> bool:
    """Whether all layers keep every token's keys and values (windows and states don't)."""
    return all(type(each) is DynamicLayer for each in getattr(cache, "layers", [None]))


def begin_with(cache: Cache, prefixes: Sequence[tuple[Prefix, int] | None]) -> Tensor:
    """Fill an empty `cache` with a row for each of `prefixes`, padded on the left; None is empty.

    Returns the mask [rows, columns] of what is there.
    """
    present = [each for each in prefixes if each is not None]
    columns = max((count for _, count in present), default=0)
    mask = torch.zeros(len(prefixes), columns, dtype=torch.long)
    for row, each in enumerate(prefixes):
        if each is not None:
            mask[row, columns - each[1] :] = 1
    for layer in range(len(present[0][0].layers) if present else 0):
        sides = []
        for side in (0, 1):
            like = present[0][0].layers[layer][side]
            rows = [
                like.new_zeros(like.shape[0], columns, like.shape[2])
                if each is None
                else pad(each[0].layers[layer][side][:, : each[1]], (0, 0, columns - each[1], 0))
                for each in prefixes
            ]
            sides.append(torch.stack(rows))
        cache.update(*sides, layer)
    return mask
