"""Joint discriminant: prompts by the states of a reader, and by a sentence embedding.

Not in the paper. The reader of router discriminant and the embedder of router retrieval err on
different prompts: a reader may take one form of request for another, an embedder misses what is
asked about a text for what the text is about. So both are read by the same discriminant: the
embeddings of an expert's training inputs, which it shares for retrieval, have a mean and a
covariance as its prompt statistics have, and an expert's score is the mean of both scores. The
three nearest act; a prompt of one expert's own task leaves next to no weight to the other two
(research/study/study.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from phatgoose.config import RATIO
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import PARTS, moments_of
from phatgoose.routing.routers.discriminant import Discriminant, Lines, Ready
from phatgoose.routing.routers.phatgoose import Temperature
from phatgoose.routing.routers.prompt import PromptChooser, Tables
from phatgoose.routing.routers.retrieval import Embeds, Searched, embeddings_of
from phatgoose.routing.routers.router import Scores
from phatgoose.tasks.embeddings import PROMPT


class Both(NamedTuple):
    """What the reader's states and what embeddings are scored with."""

    read: Ready
    embedded: Lines
    embedder: Searched


@dataclass(frozen=True)
class JointDiscriminant(Discriminant, Embeds):
    """Per prompt, the experts with the most similar training prompts, by reader and embedder.

    An expert's score is (1 - w) s_z of the reader's states + w s_z of embeddings.
    """

    name, label, usual_k = "joint-discriminant", "Joint Discriminant", 3
    needs, rows = ("prompt_statistics", "embeddings"), "embedded.mean"
    # prompt statistics, and mean and covariance of embeddings: c columns, g rows of a factor
    prompt_sizes: ClassVar[Mapping[str, str]] = {
        **Discriminant.prompt_sizes,
        **{"embedded.mean": "Ec", "embedded.factor": "Egc", "embedded.rest": "Ec"},
    }

    embedding_share: Annotated[
        float, "Weight of the embeddings, as opposed to the reader's states.", RATIO
    ] = 0.5
    temperature: Temperature = 0.05
    fallback: Literal["off"] = "off"  # no setting: the base's classes have no embeddings

    def tables(self, pool: Pool, scores: Scores | None = None) -> Tables:
        found = embeddings_of(pool)
        rows = (found.rows[found.owners == z] for z in range(len(pool)))
        own = [moments_of(each[:, None]) for each in rows]  # of one block
        moments = {f"embedded.{part}": torch.cat([each[part] for each in own]) for part in PARTS}
        read = super().tables(pool)
        info = {**read.info, "embedder": found.embedder, "embedding_form": PROMPT}
        return Tables(pool.names, {**read.tensors, **moments}, info)

    def ready(self, tables: Tables) -> Both:
        moments = {part: tables.tensors[f"embedded.{part}"] for part in PARTS}
        return Both(super().ready(tables), self.line(moments), Embeds.ready(self, tables))

    def helpers_score(self, ready: Both) -> float:
        return ready.read.helpers  # infinite: it doesn't fall back

    def features(self, chooser: PromptChooser, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ready: Both = chooser.ready
        return ready.read.reader.states(texts), ready.embedder.embed(texts)

    def prompt_scores(self, features: tuple[Tensor, Tensor], ready: Both) -> Tensor:
        states, vectors = features
        by_reader = super().prompt_scores(states, ready.read)
        embedded = vectors @ ready.embedded.slopes + ready.embedded.offsets
        return torch.lerp(by_reader, embedded, self.embedding_share)
