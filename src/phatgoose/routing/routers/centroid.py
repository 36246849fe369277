"""Centroid: for every input the experts whose training inputs' mean is nearest to it.

LoRAuter (arXiv 2601.21795) and ARIADNE (arXiv 2606.19079). An expert's centroid is the mean of the
embeddings of its training inputs, which it shares for retrieval too; the k experts with the highest
cosines act together, weighted by the softmax of the cosines over a temperature: 3 and 0.2, as
LoRAuter has it. Prompts are embedded as retrieval embeds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ...experts.pool import Pool
from .prompt_router import (
    ByPrompt,
    EmbeddingRouter,
    Embeddings,
    PromptRouter,
    Tables,
    embeddings_of,
)
from .router import Scores


class NearestCentroids(EmbeddingRouter):
    """Scores an expert by the cosine of its centroid, one of `rows` [E, columns]."""

    name = "centroid"

    def scores(self, features: Tensor) -> Tensor:
        cosines: Tensor = features @ self.rows.T
        return cosines


class Centroid(ByPrompt):
    """Router centroid."""

    prompt_form: ClassVar[Mapping[str, str]] = {"centroids": "Ec"}

    def tables(
        self, pool: Pool, scores: Scores | None = None, embedder: str | None = None
    ) -> Tables:
        found = centroids_of(pool, embedder)
        return Tables(pool.names, {"centroids": found.rows}, found.info())

    def chooser(self, tables: Tables) -> PromptRouter:
        return NearestCentroids(tables, tables.tensors["centroids"], self.embedder(tables))


def centroids_of(pool: Pool, embedder: str | None = None) -> Embeddings:
    """Each expert's mean embedding as a unit vector, [E, dims]; raises as `embeddings_of`."""
    found = embeddings_of(pool, embedder)
    sums = torch.zeros(len(pool), found.rows.shape[1]).index_add(0, found.owners, found.rows)
    rows = functional.normalize(sums, dim=-1)
    return Embeddings(rows, torch.arange(len(pool)), found.embedder)
