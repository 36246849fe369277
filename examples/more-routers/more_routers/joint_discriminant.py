"""Joint discriminant: prompts as the base reads them, and as a sentence embedder does.

Not in the paper. The base of router discriminant and the embedder of router retrieval err on
different prompts: a small decoder takes one form of request for another, an embedder misses what
is asked about a text for what the text is about. So both are read by the same discriminant: the
embeddings of an expert's training inputs, which it shares for retrieval, have a mean and a
covariance as its readings have, and an expert's score is the mean of both scores. The three nearest
act; a prompt of one expert's own task leaves next to no weight to the other two
(research/study/study.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from phatgoose.routing.routers.prompt_router import (
    Embedder,
    Prompt,
    PromptRouter,
    Tables,
    embeddings_of,
)
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import PARTS, moments_of
from phatgoose.routing.routers.discriminant import Discriminant, Line, PromptDiscriminant, States
from phatgoose.routing.routers.router import Scores


class JointDiscriminant(Discriminant):
    """Router joint-discriminant."""

    # readings, and mean and covariance of embeddings: c columns, g rows of a factor
    prompt_form: ClassVar[Mapping[str, str]] = {
        **Discriminant.prompt_form,
        **{"embedded.mean": "Ec", "embedded.factor": "Egc", "embedded.rest": "Ec"},
    }

    def tables(
        self, pool: Pool, scores: Scores | None = None, embedder: str | None = None
    ) -> Tables:
        found = embeddings_of(pool, embedder)
        rows = (found.rows[found.owners == z] for z in range(len(pool)))
        own = [moments_of(each[:, None], dtype=torch.float32) for each in rows]  # of one block
        moments = {f"embedded.{part}": torch.cat([each[part] for each in own]) for part in PARTS}
        readings = super().tables(pool).tensors
        return Tables(pool.names, {**readings, **moments}, found.info())

    def chooser(self, tables: Tables) -> PromptRouter:
        moments = {part: tables.tensors[f"embedded.{part}"] for part in PARTS}
        embedder = Embedder(self.embedder(tables), moments["mean"].shape[1])
        by_base, line = self.discriminant(tables), self.line(moments)
        return JointRouter(by_base, embedder, line, self.config.embedding_share)


class JointRouter(PromptRouter):
    """Scores an expert by (1 - w) s_z of the base's readings + w s_z of embeddings."""

    name = "joint-discriminant"
    reads_base = True

    def __init__(
        self, by_base: PromptDiscriminant, embedder: Embedder, line: Line, share: float
    ) -> None:
        super().__init__(by_base.tables)
        self.by_base, self.embedder, self.line, self.share = by_base, embedder, line, share

    def remember(self, states: States) -> None:
        self.by_base.remember(states)

    def features(
        self, prompts: Sequence[Prompt], base: PreTrainedModel | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.by_base.features(self.tokens(prompts), base), self._vectors(prompts)

    def scores(self, features: tuple[Tensor, Tensor]) -> Tensor:
        states, vectors = features
        return self._joined(self.by_base.scores(states), vectors)

    def score(self, prompts: Sequence[Prompt], base: PreTrainedModel | None = None) -> Tensor:
        return self._joined(self.by_base.score(self.tokens(prompts), base), self._vectors(prompts))

    def _vectors(self, prompts: Sequence[Prompt]) -> Tensor:
        return self.embedder.vectors(self.texts(prompts))

    def _joined(self, read: Tensor, vectors: Tensor) -> Tensor:
        slopes, offsets = self.line
        embedded = vectors @ slopes + offsets
        # With per_block the base's scores are [prompts, blocks, E].
        return torch.lerp(read, embedded if read.dim() == 2 else embedded[:, None], self.share)
