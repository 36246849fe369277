"""Centroid: for every input the experts whose training inputs' mean is nearest to it.

LoRAuter (arXiv 2601.21795) and ARIADNE (arXiv 2606.19079). An expert's centroid is the mean of the
embeddings of its training inputs, which it shares for retrieval too; the k experts with the highest
cosines act together, weighted by the softmax of the cosines over a temperature: 3 and 0.2, as
LoRAuter has it. Prompts are embedded as retrieval embeds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from ...experts.pool import Pool
from ...tasks.embeddings import usable_embedder
from ..stacks import joined
from .prompt_router import EmbeddingReader, Embeddings, LookedUp, embeddings_of
from .router import Lookup, Mixtures, SavedLookup, Scores

CENTROIDS = "lookup.centroids"  # their name in files


class CentroidReader(EmbeddingReader):
    """The experts with the nearest centroids, by cosine."""

    name = "centroid"

    def __init__(
        self,
        centroids: Tensor,
        embedder: str,
        tokenizer: PreTrainedTokenizerBase,
        k: int = 1,
        temperature: float = 1.0,
    ) -> None:
        """`centroids` [E, dims] are unit vectors of the pool's experts.

        All else is as `EmbeddingReader` has it.
        """
        super().__init__(embedder, centroids.shape[1], tokenizer, k, temperature)
        self.centroids = centroids

    def nearest_to(self, queries: Tensor) -> Mixtures:
        """The k experts with the highest cosines to each of `queries` [texts, dims]."""
        return Mixtures.best(queries @ self.centroids.T, self.k, self.temperature)

    def tensors(self) -> dict[str, Tensor]:
        """The centroids."""
        return {CENTROIDS: self.centroids}

    def grown(self, pool: Pool, first: int) -> CentroidReader:
        """The reader with the centroids of the experts of `pool` too."""
        return self._with(joined([self.centroids, centroids_of(pool, self.embedder).rows]))

    def shrunk(self, place: Tensor) -> CentroidReader:
        """The reader without the centroids of experts that leave."""
        return self._with(self.centroids[place >= 0])

    def _with(self, centroids: Tensor) -> CentroidReader:
        return type(self)(centroids, self.embedder, self.tokenizer, self.k, self.temperature)


class Centroid(LookedUp):
    """Router centroid, and the frame of others that look prompts up by centroids."""

    reader: ClassVar[type[CentroidReader]] = CentroidReader

    def lookup_of(
        self, pool: Pool, scores: Scores | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Lookup:
        """The centroids of all experts, and the embedder of prompts.

        Raises PoolError when an expert has no embeddings or two were made by different embedders,
        ConfigError without `tokenizer`, or with an embedder that must be named or can't be loaded.
        """
        reads, found = self.needed(tokenizer), centroids_of(pool)
        return self._reader(found.rows, found.embedder, reads)

    @property
    def lookup_form(self) -> Mapping[str, str]:
        """A centroid for each expert."""
        return {"centroids": "Ec"}

    def lookup_rows(self, pool: Pool, info: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The centroids of the experts of `pool`."""
        return {CENTROIDS: centroids_of(pool, info.get("embedder")).rows}

    def saved_lookup(self, saved: SavedLookup, tokenizer: PreTrainedTokenizerBase | None) -> Lookup:
        """The same, read from a saved model. Raises RoutingError where no embedder is recorded."""
        recorded = saved.embedder_for(self.spec.name)
        return self._reader(saved.tensors[CENTROIDS], recorded, self.needed(tokenizer))

    def _reader(
        self, rows: Tensor, recorded: str, tokenizer: PreTrainedTokenizerBase
    ) -> CentroidReader:
        embedder = usable_embedder(recorded, self.routing.embedder)
        return self.reader(rows, embedder, tokenizer, self.input_k, self.input_temperature)


def centroids_of(pool: Pool, embedder: str | None = None) -> Embeddings:
    """The experts' centroids: of each the mean of its embeddings, as a unit vector, [E, dims].

    Raises as `embeddings_of` does.
    """
    found = embeddings_of(pool, embedder)
    sums = torch.zeros(len(pool), found.rows.shape[1]).index_add(0, found.owners, found.rows)
    rows = functional.normalize(sums, dim=-1)
    return Embeddings(rows, torch.arange(len(pool)), found.embedder)
