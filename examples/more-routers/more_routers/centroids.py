"""Centroids: as router centroid, with up to `clusters` centroids of each expert.

The cosine of an expert's nearest centroid counts. ARIADNE (arXiv 2606.19079) keeps several for an
expert too; how it finds them was not known here. These are spherical k-means of the embeddings that
experts share, made when the pool is composed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from phatgoose.config import AT_LEAST_1
from phatgoose.experts.pool import Pool
from phatgoose.routing.routers.prompt import OWNERS, Tables
from phatgoose.routing.routers.retrieval import Centroid, Searched, embeddings_of
from phatgoose.routing.routers.router import Scores

STEPS = 20  # of k-means
SAME = 1e-6  # rows are the same vector if their cosine is this near to 1


@dataclass(frozen=True)
class Centroids(Centroid):
    """Per prompt, the experts with the nearest of several means of training inputs."""

    name, label = "centroids", "Centroids"
    prompt_sizes: ClassVar[Mapping[str, str]] = {"centroids": "Mc", OWNERS: "M"}

    clusters: Annotated[
        int, "Maximum centroids of each expert; the nearest counts.", AT_LEAST_1
    ] = 3

    def tables(self, pool: Pool, scores: Scores | None = None) -> Tables:
        found = clusters_of(pool, self.clusters)
        tensors = {"centroids": found.rows, OWNERS: found.owners}
        return Tables(pool.names, tensors, super().tables(pool).info)


def clusters_of(pool: Pool, clusters: int) -> Searched:
    """Up to `clusters` centroids of each expert, unit vectors [M, dims], with their owners [M].

    Raises as `embeddings_of`.
    """
    found = embeddings_of(pool)
    rows = [_means_of_clusters(found.rows[found.owners == z], clusters) for z in range(len(pool))]
    counts = torch.tensor([len(each) for each in rows])
    owners = torch.arange(len(pool)).repeat_interleave(counts)
    return found._replace(rows=torch.cat(rows), owners=owners)


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
