"""Retrieval and centroid: per input, the experts with the nearest embeddings of training inputs.

Retrieval (Muqeeth et al. 2024, section 4.2; Jang et al. 2023) takes the expert of the nearest
training input. Experts share embeddings of up to 1000 of theirs (`training.train_expert`); nearness
is the cosine. Inputs are embedded as plain text. The released code embeds their answer
choices too, which no served prompt has: the setting form=paper does so in comparisons. With k above
1 the k experts that have the nearest training inputs act together, weighted by the softmax of these
cosines over `temperature`: that is ours.

An expert that stores more than BOUND times as many embeddings as the pool's median is searched by
that many of them, evenly spaced: copies of the other experts' could else win all of their prompts.
That is ours too, and acts only where numbers differ so much.

Centroid (LoRAuter, arXiv 2601.21795; ARIADNE, arXiv 2606.19079) takes the experts with the nearest
means of the same embeddings: the k with the highest cosines act together, weighted by the softmax
of the cosines over a temperature: 3 and 0.2, as LoRAuter has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...config import EmbeddingForm
from ...errors import PoolError, RoutingError
from ...experts.pool import Pool
from ...tasks.embeddings import (
    PROMPT,
    TEXTS,
    embed_texts,
    load_embedder,
    paper_texts,
    usable_embedder,
)
from ..choice import Choice
from .phatgoose import Temperature
from .prompt import OWNERS, ByPrompt, Known, PromptChooser, Prompts, Tables
from .router import Scores

BOUND = 2  # of an expert's embeddings, as a multiple of the pool's median
MOST_CHARACTERS = 1 << 20  # a model of 100,000 tokens of context is given fewer


class Searched(NamedTuple):
    """Unit vectors `rows` [M, columns] by `embedder`, whose owners they are [M], of E `experts`."""

    rows: Tensor
    embedder: str
    owners: Tensor
    experts: int

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The unit vectors of texts, of which MOST_CHARACTERS count."""
        if not texts:
            raise RoutingError("Can't choose: there is no prompt.")
        vectors = embed_texts([text[:MOST_CHARACTERS] for text in texts], self.embedder)
        if vectors.shape[1:] != self.rows.shape[1:]:
            raise RoutingError(
                f"Can't choose: the experts' embeddings aren't {self.embedder}'s (sizes differ)."
            )
        return vectors


@dataclass(frozen=True)
class Embeds(ByPrompt):
    """The base of routers whose features are embeddings of text."""

    needs = ("embeddings",)
    rows: ClassVar[str] = "embeddings"  # the table with what is searched

    def ready(self, tables: Tables) -> Searched:
        info = tables.info
        form = getattr(self, "form", PROMPT)
        if "embedder" not in info or info.get("embedding_form") != form:
            raise RoutingError(f"routed.json names no embedder of {TEXTS[form]}.")
        embedder = usable_embedder(info["embedder"], self.embedder)
        load_embedder(embedder)  # not with the first prompt
        rows = tables.tensors[self.rows]
        owners = tables.tensors.get(OWNERS, torch.arange(len(rows)))
        return Searched(rows, embedder, owners, len(tables.names))

    def features(self, chooser: PromptChooser, texts: Sequence[str]) -> Tensor:
        return Searched.embed(chooser.ready, texts)

    def prompt_scores(self, features: Tensor, ready: Searched) -> Tensor:
        return best_of_each(features @ ready.rows.T, ready.owners, ready.experts)


@dataclass(frozen=True)
class Retrieval(Embeds):
    """Router retrieval: scores an expert by its nearest stored training input."""

    name = "retrieval"
    label = "Retrieval"
    usual_k = 1
    prompt_sizes: ClassVar[Mapping[str, str]] = {"embeddings": "Mc", OWNERS: "M"}

    form: Annotated[
        EmbeddingForm,
        "What is embedded: the prompt or, for experts with embeddings of that form, the paper's "
        "text: answer choices, then the input (paper; only in comparisons).",
    ] = "prompt"
    temperature: Temperature = 0.2

    @property
    def unserved(self) -> str | None:  # type: ignore[override]
        if self.form == PROMPT:
            return None
        return (
            "Router retrieval:form=paper embeds answer choices, which a prompt alone doesn't have: "
            "use it in compare, or leave form=paper out."
        )

    def tables(self, pool: Pool, scores: Scores | None = None) -> Tables:
        stored = embeddings_of(pool, self.form)
        info = {"embedder": stored.embedder, "embedding_form": self.form}
        return Tables(pool.names, {"embeddings": stored.rows, OWNERS: stored.owners}, info)

    def ready(self, tables: Tables) -> Searched:
        stored = super().ready(tables)
        chosen = _within_bound(stored.owners)
        return stored._replace(rows=stored.rows[chosen], owners=stored.owners[chosen])

    def choose(self, chooser: PromptChooser, prompts: Prompts, known: Known) -> Choice:
        """In the paper's form the prompts are embedded with the answer choices of `examples`."""
        if not self.unserved:
            return super().choose(chooser, prompts, known)
        vectors = chooser.ready.embed(paper_texts(known["examples"]))
        return self.choice(self.prompt_scores(vectors, chooser.ready))


@dataclass(frozen=True)
class Centroid(Embeds):
    """Router centroid: scores an expert by the cosine of its centroid."""

    name = "centroid"
    label = "Centroid"
    usual_k = 3
    rows = "centroids"
    prompt_sizes: ClassVar[Mapping[str, str]] = {"centroids": "Ec"}

    temperature: Temperature = 0.2

    def tables(self, pool: Pool, scores: Scores | None = None) -> Tables:
        stored = embeddings_of(pool)
        info = {"embedder": stored.embedder, "embedding_form": PROMPT}
        return Tables(pool.names, {"centroids": centroids_of(stored)}, info)


def centroids_of(stored: Searched) -> Tensor:
    """Each expert's mean embedding as a unit vector, [E, columns]."""
    sums = torch.zeros(stored.experts, stored.rows.shape[1])
    return functional.normalize(sums.index_add(0, stored.owners, stored.rows), dim=-1)


def best_of_each(scores: Tensor, owners: Tensor, experts: int) -> Tensor:
    """The highest of each expert's `scores` [B, M], -inf without any, [B, experts].

    `owners` [M] are the experts that columns belong to.
    """
    best = scores.new_full((len(scores), experts), -torch.inf)
    return best.scatter_reduce(1, owners.expand_as(scores), scores, "amax")


def embeddings_of(pool: Pool, form: str = PROMPT) -> Searched:
    """The embeddings of all experts of `pool`: one embedder's, one `form`'s; else PoolError."""
    rows = list[Tensor]()
    kinds = set[tuple[str, int]]()
    flag = "" if form == PROMPT else f" --embedding-form {form}"
    for expert in pool.experts:
        info = expert.info
        stored = expert.embeddings
        if stored is None or not info.embedder or info.embedding_form != form:
            raise PoolError(
                f"Expert {expert.name!r} has no embeddings of {TEXTS[form]}; measure them: "
                f"phatgoose stats {expert.directory} --task ITS-DATA --embeddings --no-means "
                f"--no-readings{flag}"
            )
        rows.append(stored)
        kinds.add((info.embedder, stored.shape[1]))
    if len(kinds) > 1:
        named = ", ".join(f"{name} ({width} numbers each)" for name, width in sorted(kinds))
        raise PoolError(f"The experts' embeddings can't be compared, for they are of {named}.")
    owners = torch.arange(len(rows)).repeat_interleave(torch.tensor([*map(len, rows)]))
    unit = functional.normalize(torch.cat(rows).float(), dim=-1)
    return Searched(unit, kinds.pop()[0], owners, len(pool))


def _within_bound(owners: Tensor) -> Tensor:
    counts = owners.bincount()
    stored = counts[counts > 0].double()
    most = max(1, int(BOUND * stored.quantile(0.5)))
    if stored.max() <= most:
        return torch.arange(len(owners))
    spaced = []
    for z in counts.nonzero():
        rows = (owners == z).nonzero().flatten()
        places = torch.linspace(0, len(rows) - 1, min(len(rows), most)).long()
        spaced.append(rows[places])
    return torch.cat(spaced).sort().values
