"""Centroid: for every input the experts whose training inputs' mean is nearest to it.

LoRAuter (arXiv 2601.21795) and ARIADNE (arXiv 2606.19079). An expert's centroid is the mean of the
embeddings of its training inputs, which it shares for retrieval too; the k experts with the highest
cosines act together, weighted by the softmax of the cosines over a temperature: 3 and 0.2, as
LoRAuter has it. Prompts are embedded as retrieval embeds them.

With `clusters` = K an expert has up to K centroids, and the cosine of the nearest counts. ARIADNE
keeps several for an expert too; how it finds them was not known here. These are spherical k-means
of the embeddings that experts share, made when the pool is composed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ...config import Routing
from ...experts.pool import Pool
from .prompt_router import (
    OWNERS,
    ByPrompt,
    EmbeddingRouter,
    Embeddings,
    PromptRouter,
    Tables,
    best_of_each,
    embeddings_of,
)
from .router import Scores

STEPS = 20  # of k-means
SAME = 1e-6  # rows are the same vector if their cosine is this near to 1


class NearestCentroids(EmbeddingRouter):
    """Scores an expert by the cosine of its centroid, one of `rows` [E, columns].

    With OWNERS among the tables, `rows` are [M, columns], and an expert's nearest counts.
    """

    name = "centroid"

    def scores(self, features: Tensor) -> Tensor:
        cosines = features @ self.rows.T
        owners = self.tables.tensors.get(OWNERS)
        return cosines if owners is None else best_of_each(cosines, owners, len(self.experts))


class Centroid(ByPrompt):
    """Router centroid, and the frame of others that go by centroids."""

    nearest: ClassVar[type[NearestCentroids]] = NearestCentroids
    clusters = 1  # glider's

    def __init__(self, routing: Routing) -> None:
        super().__init__(routing)
        self.clusters = getattr(self.config, "clusters", self.clusters)

    @property
    def prompt_form(self) -> Mapping[str, str]:  # type: ignore[override]
        return {"centroids": "Ec"} if self.clusters == 1 else {"centroids": "Mc", OWNERS: "M"}

    def tables(
        self, pool: Pool, scores: Scores | None = None, embedder: str | None = None
    ) -> Tables:
        if self.clusters == 1:
            found = centroids_of(pool, embedder)
            return Tables(pool.names, {"centroids": found.rows}, found.info())
        found = clusters_of(pool, self.clusters, embedder)
        tensors = {"centroids": found.rows, OWNERS: found.owners}
        return Tables(pool.names, tensors, found.info())

    def chooser(self, tables: Tables) -> PromptRouter:
        return self.nearest(tables, tables.tensors["centroids"], self.embedder(tables))


def centroids_of(pool: Pool, embedder: str | None = None) -> Embeddings:
    """Each expert's mean embedding as a unit vector, [E, dims]; raises as `embeddings_of`."""
    found = embeddings_of(pool, embedder)
    sums = torch.zeros(len(pool), found.rows.shape[1]).index_add(0, found.owners, found.rows)
    rows = functional.normalize(sums, dim=-1)
    return Embeddings(rows, torch.arange(len(pool)), found.embedder)


def clusters_of(pool: Pool, clusters: int, embedder: str | None = None) -> Embeddings:
    """Up to `clusters` centroids of each expert, unit vectors [M, dims], with their owners [M].

    Raises as `embeddings_of`.
    """
    found = embeddings_of(pool, embedder)
    rows = [_means_of_clusters(found.rows[found.owners == z], clusters) for z in range(len(pool))]
    counts = torch.tensor([len(each) for each in rows])
    owners = torch.arange(len(pool)).repeat_interleave(counts)
    return Embeddings(torch.cat(rows), owners, found.embedder)


def _means_of_clusters(rows: Tensor, clusters: int) -> Tensor:
    """The unit means of up to `clusters` clusters of unit `rows`, by spherical k-means."""
    centres = functional.normalize(rows.mean(dim=0, keepdim=True), dim=-1)
    for _ in range(clusters - 1):  # each start is the row farthest from those before
        nearest = (rows @ centres.T).amax(dim=1)
        if nearest.min() > 1 - SAME:
            break
        centres = torch.cat([centres, rows[nearest.argmin()][None]])
    for _ in range(STEPS):
        owners = (rows @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add(0, owners, rows)
        used = owners.bincount(minlength=len(centres)) > 0
        moved = functional.normalize(sums[used], dim=-1)
        if moved.shape == centres.shape and torch.equal(moved, centres):
            break
        centres = moved
    return centres
