"""Retrieval: for every input the expert of the nearest training input.

Muqeeth et al. 2024, section 4.2; Jang et al. 2023. Experts share embeddings of up to 1000 of their
training inputs (`training.statistics`); nearness is the cosine. Inputs are embedded as the
model reads them. The released code embeds their answer choices too, which no served prompt has:
the setting form=paper does so in comparisons. With k above 1 the k experts that have the
nearest training inputs act together, weighted by the softmax of these cosines over
`temperature`: that is ours.

An expert that stores more than BOUND times as many embeddings as the pool's median is searched by
that many of them, evenly spaced: copies of the other experts' could else win all of their prompts.
That is ours too, and acts only where numbers differ so much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import RoutingError
from ...experts.pool import Pool
from ...tasks.embeddings import PROMPT, paper_texts
from ..choices import Choice
from .prompt_router import (
    OWNERS,
    ByPrompt,
    EmbeddingRouter,
    Prompt,
    PromptRouter,
    Tables,
    best_of_each,
    embeddings_of,
)
from .router import Scores

BOUND = 2  # of an expert's embeddings, as a multiple of the pool's median


class Retrieval(ByPrompt):
    """Router retrieval."""

    prompt_form: ClassVar[Mapping[str, str]] = {"embeddings": "Mc", OWNERS: "M"}

    @property
    def unserved(self) -> str | None:  # type: ignore[override]
        if self.config.form == PROMPT:
            return None
        return (
            "Router retrieval:form=paper embeds answer choices, which a prompt alone doesn't have: "
            "use it in compare, or leave form=paper out."
        )

    def tables(
        self, pool: Pool, scores: Scores | None = None, embedder: str | None = None
    ) -> Tables:
        form = self.config.form
        found = embeddings_of(pool, embedder, form)
        tensors = {"embeddings": found.rows, OWNERS: found.owners}
        return Tables(pool.names, tensors, found.info(form))

    def chooser(self, tables: Tables) -> PromptRouter:
        return Retriever(tables, self.embedder(tables, self.config.form))


class Retriever(EmbeddingRouter):
    """Scores an expert by its nearest stored training input, by cosine."""

    name = "retrieval"

    def __init__(self, tables: Tables, embedder: str) -> None:
        owners = tables.tensors[OWNERS]
        searched = _within_bound(owners)
        super().__init__(tables, tables.tensors["embeddings"][searched], embedder)
        self._theirs = owners[searched]

    def choose(
        self, prompts: Sequence[Prompt], base: PreTrainedModel | None = None, **known: Any
    ) -> Choice:
        """In the paper's form the prompts are embedded with the answer choices of `examples`."""
        if not self.unserved:
            return super().choose(prompts)
        if known.get("examples") is None:
            raise RoutingError(self.unserved)
        return self.choice(self.scores(self.embedder.vectors(paper_texts(known["examples"]))))

    def scores(self, features: Tensor) -> Tensor:
        return best_of_each(features @ self.rows.T, self._theirs, len(self.experts))


def _within_bound(owners: Tensor) -> Tensor:
    counts = owners.bincount()
    held = counts[counts > 0].double()
    most = max(1, int(BOUND * held.quantile(0.5)))
    if held.max() <= most:
        return torch.arange(len(owners))
    own = [(owners == z).nonzero().flatten() for z in counts.nonzero().flatten()]
    spaced = [rows[torch.linspace(0, len(rows) - 1, min(len(rows), most)).long()] for rows in own]
    return torch.cat(spaced).sort().values
