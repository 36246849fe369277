"""Retrieval: for every input the expert of the nearest training input.

Muqeeth et al. 2024, section 4.2; Jang et al. 2023. Experts share embeddings of up to 1000 of their
training inputs (`training.router_statistics`); nearness is the cosine. With `input_k` above 1 the k
experts that have the nearest training inputs act together, weighted by the softmax of these cosines
over `input_temperature`: that is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....config import Formatting
from ....errors import PoolError, RoutingError
from ....experts.expert import Expert
from ....experts.pool import Pool
from ....tasks.embeddings import embed_texts, load_embedder, retrieval_text, usable_embedder
from ....tasks.task import Example
from ...stacks.rows import joined
from ..lookup import Lookup, SavedLookup
from ..mixtures import Mixtures
from ..scores import Scores
from .looked_up import LookedUp
from .prompt_reader import PromptReader

__all__ = ["EMBEDDINGS", "OWNERS", "Embeddings", "Retrieval", "Retriever", "embeddings_of"]

EMBEDDINGS, OWNERS = "lookup.embeddings", "lookup.owners"  # their names in files


class Retrieval(LookedUp):
    """Router retrieval."""

    @property
    def lookup_form(self) -> Mapping[str, str]:
        """Training inputs, and whose they are."""
        return {"embeddings": "Mc", "owners": "M"}

    def lookup_rows(self, pool: Pool, info: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The embeddings of the experts of `pool`, made by the embedder of those they join."""
        found = embeddings_of(pool, info.get("embedder"))
        return {EMBEDDINGS: found.rows, OWNERS: found.owners}

    def lookup_of(
        self, pool: Pool, scores: Scores | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Lookup:
        """The embeddings of all experts, and the embedder of prompts.

        Raises PoolError when an expert has no embeddings or two were made by different embedders,
        ConfigError without `tokenizer`, or with an embedder that must be named or can't be loaded.
        """
        reads = self.needed(tokenizer)
        found = embeddings_of(pool)
        embedder = usable_embedder(found.embedder, self.routing.retrieval_embedder)
        return self._retriever(found.rows, found.owners, embedder, reads)

    def saved_lookup(self, saved: SavedLookup, tokenizer: PreTrainedTokenizerBase | None) -> Lookup:
        """The same, read from a saved model. Raises RoutingError when it isn't whole."""
        if "embedder" not in saved.info:
            raise RoutingError("Router retrieval needs lookup.embedder in routed.json.")
        reads, tensors = self.needed(tokenizer), saved.tensors
        if EMBEDDINGS not in tensors or not len(tensors[OWNERS]):
            raise RoutingError("Router retrieval has no embeddings to look inputs up in.")
        embedder = usable_embedder(saved.info["embedder"], self.routing.retrieval_embedder)
        return self._retriever(tensors[EMBEDDINGS], tensors[OWNERS], embedder, reads)

    def _retriever(
        self, rows: Tensor, owners: Tensor, embedder: str, tokenizer: PreTrainedTokenizerBase
    ) -> Retriever:
        k, temperature = self.input_k, self.input_temperature
        return Retriever(rows, owners, embedder, tokenizer, k, temperature)


class Retriever(PromptReader):
    """The experts that own the nearest stored training inputs, by cosine."""

    name = "retrieval"

    def __init__(
        self,
        embeddings: Tensor,
        owners: Tensor,
        embedder: str,
        tokenizer: PreTrainedTokenizerBase,
        k: int = 1,
        temperature: float = 1.0,
    ) -> None:
        """`embeddings` [M, dims] are unit vectors made by `embedder`, `owners` [M] their experts.

        `tokenizer` is as `PromptReader` takes it. `k` experts serve an input, weighted by the
        softmax of their cosines over `temperature`. Loads the embedder, so that composing a
        model waits for it, and not the first prompt. Raises ConfigError.
        """
        super().__init__(tokenizer)
        load_embedder(embedder)
        self.embeddings, self.owners, self.embedder = embeddings, owners, embedder
        self.k, self.temperature = k, temperature

    def tensors(self) -> dict[str, Tensor]:
        """The embeddings and their owners."""
        return {EMBEDDINGS: self.embeddings, OWNERS: self.owners}

    def info(self) -> dict[str, Any]:
        """The embedder's name."""
        return {"embedder": self.embedder}

    def grown(self, pool: Pool, first: int) -> Retriever:
        """The retriever with the embeddings of the experts of `pool` too."""
        new = embeddings_of(pool, self.embedder)
        owners = joined([self.owners, new.owners + first])
        embeddings = joined([self.embeddings, new.rows])
        return self._of(embeddings, owners)

    def shrunk(self, place: Tensor) -> Retriever:
        """The retriever without the embeddings of experts that leave."""
        owners = place[self.owners]
        stay = owners >= 0
        return self._of(self.embeddings[stay], owners[stay])

    def _of(self, embeddings: Tensor, owners: Tensor) -> Retriever:
        return Retriever(
            embeddings, owners, self.embedder, self.tokenizer, self.k, self.temperature
        )

    def nearest(self, texts: Sequence[str], formatting: Formatting | None = None) -> Mixtures:
        """The k experts that own the embeddings nearest to each text.

        Texts too long for the embedder are cut as `formatting` has it.
        """
        truncation = (formatting or Formatting()).truncation
        queries = embed_texts(texts, self.embedder, truncation)
        if queries.shape[1] != self.embeddings.shape[1]:
            raise RoutingError(
                f"The experts' embeddings have {self.embeddings.shape[1]} columns, those of "
                f"{self.embedder} {queries.shape[1]}; they are another embedder's."
            )
        cosines = queries @ self.embeddings.T
        if self.k == 1:
            return Mixtures.alone(self.owners[cosines.argmax(dim=-1)])
        best = torch.full((len(cosines), int(self.owners.max()) + 1), -torch.inf)
        best = best.scatter_reduce(1, self.owners.expand_as(cosines), cosines, "amax")
        return Mixtures.best(best, self.k, self.temperature)

    def of_prompts(self, texts: Sequence[str]) -> Mixtures:
        """The experts of each prompt, without answer choices."""
        return self.nearest([retrieval_text(text, ()) for text in texts])

    def find(self, examples: Sequence[Example], formatting: Formatting | None = None) -> Mixtures:
        """The experts of each example; its answer choices are a part of the query."""
        texts = [retrieval_text(example.input, example.choices) for example in examples]
        return self.nearest(texts, formatting)


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of training inputs, `rows` [M, dims], by `embedder`, and their experts [M]."""

    rows: Tensor
    owners: Tensor
    embedder: str


def embeddings_of(pool: Pool, embedder: str | None = None) -> Embeddings:
    """Those of all experts of `pool`; `owners` are indices in it.

    Raises PoolError when an expert has none or they come from several embedders, or from another
    than `embedder`.
    """
    rows = [_embeddings(expert) for expert in pool.experts]
    kinds = {
        (str(expert.info.embedder), row.shape[1])
        for expert, row in zip(pool.experts, rows, strict=True)
    }
    if len(kinds) > 1:
        raise PoolError(
            f"The experts' embeddings come from several embedders and can't be compared: {kinds}."
        )
    found = kinds.pop()[0]
    if embedder not in (None, found):
        raise PoolError(f"The experts' embeddings come from {found}, those there from {embedder}.")
    owners = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
    unit = torch.nn.functional.normalize(torch.cat(rows).float(), dim=-1)
    return Embeddings(unit, owners, found)


def _embeddings(expert: Expert) -> Tensor:
    if expert.embeddings is None or expert.info.embedder is None:
        lacks = "embeddings" if expert.embeddings is None else "record of its embedder"
        raise PoolError(
            f"Expert {expert.name!r} has no {lacks}; run 'phatgoose measure' on it or leave it out."
        )
    return expert.embeddings
