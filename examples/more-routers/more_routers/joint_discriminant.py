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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from phatgoose.config import RATIO
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import PARTS, moments_of
from phatgoose.routing.routers.discriminant import Discriminant, Lines
from phatgoose.routing.routers.phatgoose import Temperature
from phatgoose.routing.routers.prompt import Base, PromptChooser, Prompts, Tables
from phatgoose.routing.routers.retrieval import Embeds, Searched, embeddings_of
from phatgoose.routing.routers.router import Scores
from phatgoose.tasks.embeddings import PROMPT


class Both(NamedTuple):
    """What the base's readings and what embeddings are scored with."""

    lines: Lines
    embedded: Lines
    embedder: Searched


@dataclass(frozen=True)
class JointDiscriminant(Discriminant, Embeds):
    """Per prompt, the experts with the most similar training prompts, by base and embedder.

    An expert's score is (1 - w) s_z of the base's readings + w s_z of embeddings.
    """

    name, label, usual_k = "joint-discriminant", "Joint Discriminant", 3
    needs, rows = ("readings", "embeddings"), "embedded.mean"
    # readings, and mean and covariance of embeddings: c columns, g rows of a factor
    prompt_sizes: ClassVar[Mapping[str, str]] = {
        **Discriminant.prompt_sizes,
        **{"embedded.mean": "Ec", "embedded.factor": "Egc", "embedded.rest": "Ec"},
    }

    embedding_share: Annotated[
        float, "Weight of the embeddings, as opposed to the base's hidden states.", RATIO
    ] = 0.5
    temperature: Temperature = 0.05
    fallback: Literal["off"] = "off"  # no setting: the base's classes have no embeddings

    def tables(self, pool: Pool, scores: Scores | None = None) -> Tables:
        found = embeddings_of(pool)
        rows = (found.rows[found.owners == z] for z in range(len(pool)))
        own = [moments_of(each[:, None]) for each in rows]  # of one block
        moments = {f"embedded.{part}": torch.cat([each[part] for each in own]) for part in PARTS}
        info = {"embedder": found.embedder, "embedding_form": PROMPT}
        return Tables(pool.names, {**super().tables(pool).tensors, **moments}, info)

    def ready(self, tables: Tables) -> Both:
        moments = {part: tables.tensors[f"embedded.{part}"] for part in PARTS}
        return Both(super().ready(tables), self.line(moments), Embeds.ready(self, tables))

    def prompt_scores(self, features: Tensor, ready: Both) -> Tensor:
        return super().prompt_scores(features, ready.lines)

    def score(self, chooser: PromptChooser, prompts: Prompts, base: Base) -> Tensor:
        ready, by_base = chooser.ready, super().score(chooser, prompts, base)
        vectors = ready.embedder.embed(chooser.texts(prompts))
        embedded = vectors @ ready.embedded.slopes + ready.embedded.offsets
        return torch.lerp(by_base, embedded, self.embedding_share)
