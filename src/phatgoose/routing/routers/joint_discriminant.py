"""Joint discriminant: prompts as the base reads them, and as a sentence embedder does.

Not in the paper. The base of router discriminant and the embedder of router retrieval err on
different prompts: a small decoder takes one form of request for another, an embedder misses what
is asked about a text for what the text is about. So both are read by the same discriminant: the
embeddings of an expert's training inputs, which it shares for retrieval, have a mean and a
covariance as its readings have, and an expert's score is the mean of both scores. The three nearest
act; a prompt of one expert's own task leaves next to no weight to the other two (docs/study.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...experts.pool import Pool
from ...experts.readings import moments_of
from ...tasks.embeddings import PROMPT, prompt_texts, usable_embedder
from .configs import JointDiscriminant as JointConfig
from .discriminant import (
    Discriminant,
    PromptDiscriminant,
    Readings,
    joined_moments,
    line_of,
    readings_in,
)
from .prompt_router import PromptEmbedder, embeddings_of
from .router import Lookup, SavedLookup, Scores

PREFIX = "embedded."  # before a part's name, among the lookup's tensors
EMBEDDED = f"lookup.{PREFIX}"  # and in files
FORM = {"mean": "Ec", "factor": "Egc", "rest": "Ec"}


class JointDiscriminant(Discriminant):
    """Router joint-discriminant."""

    @property
    def lookup_form(self) -> Mapping[str, str]:
        """Readings, and mean and covariance of embeddings: c columns, g rows of a factor."""
        return {**super().lookup_form, **{f"{PREFIX}{part}": FORM[part] for part in FORM}}

    def lookup_rows(self, pool: Pool, info: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Both for the experts of `pool`, embedded by the embedder of those they join."""
        moments, _ = _moments_in(pool, info.get("embedder"))
        return {**super().lookup_rows(pool, info), **_named(moments)}

    def lookup_of(
        self, pool: Pool, scores: Scores | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Lookup:
        """The discriminants of the pool, and the embedder of prompts.

        Raises PoolError when an expert has no embeddings or two were made by different embedders,
        ConfigError without `tokenizer`, or with an embedder that must be named or can't be loaded.
        """
        moments, recorded = _moments_in(pool)
        return self._joint(readings_in(pool), moments, recorded, tokenizer)

    def saved_lookup(self, saved: SavedLookup, tokenizer: PreTrainedTokenizerBase | None) -> Lookup:
        """The same, from a saved model. Raises RoutingError when it isn't whole."""
        recorded = saved.embedder_for(self.spec.name)
        moments = {part: saved.tensors[f"{EMBEDDED}{part}"] for part in FORM}
        return self._joint(self.readings_from(saved), moments, recorded, tokenizer)

    def _joint(
        self,
        readings: Readings,
        moments: Readings,
        recorded: str,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> JointReader:
        embedder = usable_embedder(recorded, self.routing.embedder)
        asked = self.needed(tokenizer), self.input_k, self.input_temperature
        return JointReader(readings, moments, embedder, self.config, *asked)


class JointReader(PromptDiscriminant):
    """Scores an expert by (1 - w) s_z of the base's readings + w s_z of embeddings.

    s_z is that of `PromptDiscriminant`, and w the `embedding_share`.
    """

    name = "joint-discriminant"
    config: JointConfig

    def __init__(
        self,
        readings: Readings,
        moments: Readings,
        embedder: str,
        config: JointConfig,
        tokenizer: PreTrainedTokenizerBase,
        k: int = 1,
        temperature: float = 1.0,
    ) -> None:
        """`moments` are those of the embeddings that `embedder` makes of training inputs.

        By part, `mean` [E, c], `factor` [E, g, c] and `rest` [E, c]; all else is as
        `PromptDiscriminant` has it. Raises as that does, and as `PromptEmbedder`.
        """
        super().__init__(readings, config, tokenizer, k, temperature)
        self.moments = moments
        self.prompts = PromptEmbedder(embedder, moments["mean"].shape[1])
        self.embedding_slopes, self.embedding_offsets = line_of(moments, config)

    def scores(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The score of each prompt and expert, float32 [prompts, E]."""
        vectors = self.prompts.vectors(prompt_texts(self.tokenizer, prompts))
        embedded = vectors @ self.embedding_slopes + self.embedding_offsets
        return torch.lerp(super().scores(prompts), embedded, self.config.embedding_share)

    def tensors(self) -> dict[str, Tensor]:
        """The readings of all experts, and what their embeddings are like."""
        return {**super().tensors(), **_named(self.moments)}

    def info(self) -> dict[str, Any]:
        """The embedder's name, and what it embedded."""
        return {"embedder": self.prompts.name, "embedding_form": PROMPT}

    def grown(self, pool: Pool, first: int) -> JointReader:
        """The reader of the experts of `pool` too. Raises PoolError when they don't fit."""
        new, _ = _moments_in(pool, self.prompts.name)
        readings = joined_moments(self.readings, readings_in(pool))
        return self._with(readings, joined_moments(self.moments, new, "embeddings"))

    def shrunk(self, place: Tensor) -> JointReader:
        """The reader of the experts that stay."""
        both = self.readings, self.moments
        stay = ({part: rows[place >= 0] for part, rows in each.items()} for each in both)
        return self._with(*stay)

    def _with(self, readings: Readings, moments: Readings) -> JointReader:
        how = self.config, self.tokenizer, self.k, self.temperature
        return JointReader(readings, moments, self.prompts.name, *how)


def _moments_in(pool: Pool, embedder: str | None = None) -> tuple[Readings, str]:
    """Mean and covariance of each expert's embeddings, by part [E, ..], and their embedder.

    Raises as `embeddings_of` does.
    """
    found = embeddings_of(pool, embedder)
    rows = (found.rows[found.owners == z] for z in range(len(pool)))
    own = [moments_of(each[:, None], dtype=torch.float32) for each in rows]  # of one block
    return {part: torch.cat([each[part] for each in own]) for part in FORM}, found.embedder


def _named(moments: Readings) -> dict[str, Tensor]:
    return {f"{EMBEDDED}{part}": tensor for part, tensor in moments.items()}
