"""Retrieval: for every input the expert of the nearest training input.

Muqeeth et al. 2024, section 4.2; Jang et al. 2023. Experts share embeddings of up to 1000 of their
training inputs (`training.statistics`); nearness is the cosine. Inputs are embedded as the
model reads them. The released code embeds their answer choices too, which no served prompt has:
the setting form=paper does so in comparisons. With k above 1 the k experts that have the
nearest training inputs act together, weighted by the softmax of these cosines over
`temperature`: that is ours.

An expert that stores more than BOUND times as many embeddings as the pool's median is searched by
so many of them, evenly spaced: copies of the other experts' could else win all of their prompts.
That is ours too, and acts only where numbers differ so much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...errors import RoutingError
from ...experts.pool import Pool
from ...tasks.embeddings import PROMPT, paper_texts, usable_embedder
from ...tasks.task import Example
from ..stacks import joined
from .prompt_router import EmbeddingReader, LookedUp, embeddings_of
from .router import Lookup, Mixtures, SavedLookup, Scores

BOUND = 2  # of an expert's embeddings, as a multiple of the pool's median
EMBEDDINGS, OWNERS = "lookup.embeddings", "lookup.owners"  # their names in files


class Retrieval(LookedUp):
    """Router retrieval."""

    @property
    def lookup_form(self) -> Mapping[str, str]:
        """Training inputs, and whose they are."""
        return {"embeddings": "Mc", "owners": "M"}

    def lookup_rows(self, pool: Pool, info: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The embeddings of the experts of `pool`, made by the embedder of those they join."""
        found = embeddings_of(pool, info.get("embedder"), self.config.form)
        return {EMBEDDINGS: found.rows, OWNERS: found.owners}

    def lookup_of(
        self, pool: Pool, scores: Scores | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Lookup:
        """The embeddings of all experts, and the embedder of prompts.

        Raises PoolError when an expert has no embeddings or two were made by different embedders,
        ConfigError without `tokenizer`, or with an embedder that must be named or can't be loaded.
        """
        reads = self.needed(tokenizer)
        found = embeddings_of(pool, form=self.config.form)
        embedder = usable_embedder(found.embedder, self.routing.embedder)
        return self._retriever(found.rows, found.owners, embedder, reads)

    def saved_lookup(self, saved: SavedLookup, tokenizer: PreTrainedTokenizerBase | None) -> Lookup:
        """The same, read from a saved model. Raises RoutingError where no embedder is recorded."""
        recorded = saved.embedder_for(self.spec.name, self.config.form)
        reads, tensors = self.needed(tokenizer), saved.tensors
        embedder = usable_embedder(recorded, self.routing.embedder)
        return self._retriever(tensors[EMBEDDINGS], tensors[OWNERS], embedder, reads)

    def _retriever(
        self, rows: Tensor, owners: Tensor, embedder: str, tokenizer: PreTrainedTokenizerBase
    ) -> Retriever:
        how = self.input_k, self.input_temperature, self.config.form
        return Retriever(rows, owners, embedder, tokenizer, *how)


class Retriever(EmbeddingReader):
    """The experts that own the nearest stored training inputs, by cosine.

    All of them are kept, so that a pool that grows or shrinks gets new bounds.
    """

    name = "retrieval"

    def __init__(
        self,
        embeddings: Tensor,
        owners: Tensor,
        embedder: str,
        tokenizer: PreTrainedTokenizerBase,
        k: int = 1,
        temperature: float = 1.0,
        form: str = PROMPT,
    ) -> None:
        """`embeddings` [M, dims] are unit vectors made by `embedder`, `owners` [M] their experts.

        `form` says of what texts: prompts, or the paper's. All else is as `EmbeddingReader` has it.
        """
        super().__init__(embedder, embeddings.shape[1], tokenizer, k, temperature)
        self.embeddings, self.owners, self.form = embeddings, owners, form
        searched = _within_bound(owners)
        self._rows, self._theirs = embeddings[searched], owners[searched]

    def find(
        self, prompts: Sequence[Sequence[int]], examples: Sequence[Example] | None = None
    ) -> Mixtures:
        """The experts of each prompt.

        Raises RoutingError for the paper's form without `examples`, whose choices are embedded.
        """
        if self.form == PROMPT:
            return super().find(prompts)
        if examples is None:
            raise RoutingError(
                "Router retrieval:form=paper embeds answer choices, which a prompt alone doesn't "
                "have: use it in compare, or leave form=paper out."
            )
        return self.nearest_to(self.prompts.vectors(paper_texts(examples)))

    def info(self) -> dict[str, Any]:
        """The embedder's name, and what it embedded."""
        return {**super().info(), "embedding_form": self.form}

    def tensors(self) -> dict[str, Tensor]:
        """The embeddings and their owners."""
        return {EMBEDDINGS: self.embeddings, OWNERS: self.owners}

    def grown(self, pool: Pool, first: int) -> Retriever:
        """The retriever with the embeddings of the experts of `pool` too."""
        new = embeddings_of(pool, self.embedder, self.form)
        owners = joined([self.owners, new.owners + first])
        return self._with(joined([self.embeddings, new.rows]), owners)

    def shrunk(self, place: Tensor) -> Retriever:
        """The retriever without the embeddings of experts that leave."""
        owners = place[self.owners]
        stay = owners >= 0
        return self._with(self.embeddings[stay], owners[stay])

    def _with(self, rows: Tensor, owners: Tensor) -> Retriever:
        how = self.k, self.temperature, self.form
        return Retriever(rows, owners, self.embedder, self.tokenizer, *how)

    def nearest_to(self, queries: Tensor) -> Mixtures:
        """The k experts that own the embeddings nearest to each of `queries` [texts, dims]."""
        cosines = queries @ self._rows.T
        if self.k == 1:
            return Mixtures.alone(self._theirs[cosines.argmax(dim=-1)])
        best = torch.full((len(cosines), int(self.owners.max()) + 1), -torch.inf)
        best = best.scatter_reduce(1, self._theirs.expand_as(cosines), cosines, "amax")
        return Mixtures.best(best, self.k, self.temperature)


def _within_bound(owners: Tensor) -> Tensor:
    """The rows to search [R], in order: of each of the `owners` [M] no more than its bound."""
    counts = owners.bincount()
    held = counts[counts > 0].double()
    most = max(1, int(BOUND * held.quantile(0.5)))
    if held.max() <= most:
        return torch.arange(len(owners))
    own = [(owners == z).nonzero().flatten() for z in counts.nonzero().flatten()]
    spaced = [rows[torch.linspace(0, len(rows) - 1, min(len(rows), most)).long()] for rows in own]
    return torch.cat(spaced).sort().values
