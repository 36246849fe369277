"""What all measurements share: sizes, the base model, random experts and routed models."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import phatgoose as pg
from phatgoose.base.identity import Base, twin
from phatgoose.base.loading import load_base
from synthetic import random_experts, tiny_base

VOCABULARY = (
    "the", "a", "green", "old", "ship", "tree", "rain", "went", "over", "under", "far", "home",
    "and", "then", "sang", "slowly",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and in which type; `pools` are numbers of experts E."""

    rounds: int = 7
    dtype: str = "bfloat16"
    base: str = "smollm2"
    rank: int = 16
    k: int = 2
    pools: tuple[int, ...] = (36, 166)
    growing: tuple[int, ...] = (10, 36, 100, 166, 1000)
    prefill: tuple[int, int] = (8, 128)
    linears: tuple[tuple[int, int], ...] = ((2048, 2048), (2048, 5120))
    linear_tokens: int = 1024
    decoded_after: int = 64
    decoded: int = 16
    ranked: int = 24
    ranked_batch: int = 8
    tail: int = 4  # tokens of a prompt that experts act on where they act from its end on
    training_batch: int = 8
    training_steps: int = 3
    calls: int = 10  # of one linear layer, in a row

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch has it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def prefilled(self) -> str:
        """What a prefill is measured on, in words."""
        return f"{self.base}, {self.prefill[0]} × {self.prefill[1]} tokens"

    @property
    def stem(self) -> str:
        """What names of files made for the base in this type begin with."""
        return self.base if self.dtype == "bfloat16" else f"{self.base}-{self.dtype}"


FULL = Sizes()
SMOKE = Sizes(
    rounds=2,
    base="tiny",
    rank=8,
    pools=(3, 6),
    growing=(3, 6),
    prefill=(2, 8),
    linears=((32, 32), (32, 64)),
    linear_tokens=32,
    decoded_after=4,
    decoded=2,
    ranked=4,
    ranked_batch=2,
    tail=2,
    training_batch=2,
    training_steps=2,
    calls=2,
)


@dataclass(frozen=True)
class Bench:
    """Where and how much is measured; models are loaded once for all rows of the table."""

    sizes: Sizes
    pools: Path
    _routed: dict[object, PreTrainedModel] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def base(self) -> Base:
        """The base model, never changed: routed models are made from twins of it."""
        return load_base(self.base_name, dtype=self.sizes.dtype, device="cpu")

    @property
    def base_name(self) -> str:
        """Its name for `load_base`; the tiny one is created on each use."""
        return tiny_base(self.pools / "base") if self.sizes.base == "tiny" else self.sizes.base

    def experts(self, count: int) -> list[Path]:
        """The folders of `count` random experts for the base, kept for the next run."""
        return random_experts(self.base, self.pools / self.sizes.stem, count, self.sizes.rank)

    def routed(self, count: int, *, at_ends: bool = False, **options: str) -> PreTrainedModel:
        """A twin of the base routed among `count` experts, by PHATGOOSE unless `options` say more.

        It is kept for the next rows. `at_ends`: they act on the last tokens of prompts only.
        """
        key = (count, at_ends, *sorted(options.items()))
        if key not in self._routed:
            pool = pg.Pool.open(self.experts(count))
            pool = self.at_ends(pool) if at_ends else pool
            settings = {"router": "phatgoose", **options}
            self._routed[key] = pg.compose(pool, twin(self.base), k=self.sizes.k, **settings)
        return self._routed[key]

    def at_ends(self, pool: pg.Pool) -> pg.Pool:
        """The experts of `pool`, acting from the last tokens of a prompt on."""
        record = {"tail": self.sizes.tail}
        infos = (replace(expert.info, acts_on=record) for expert in pool.experts)
        pairs = zip(pool.experts, infos, strict=True)
        return pg.Pool(tuple(replace(expert, info=info) for expert, info in pairs))

    def prompts(self, rows: int, columns: int) -> dict[str, Tensor]:
        """A batch of random tokens without padding."""
        generator = torch.Generator().manual_seed(0)
        most = self.base.model.config.vocab_size
        tokens = torch.randint(3, most, (rows, columns), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def words(generator: random.Random, count: int) -> str:
    """A text of `count` random words."""
    return " ".join(generator.choices(VOCABULARY, k=count))
