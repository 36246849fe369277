"""The routers' own settings, one class for each router that has some; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ...config import (
    AT_LEAST_1,
    EMBEDDING_FORMS,
    NOT_NEGATIVE,
    POSITIVE,
    RATIO,
    SEED,
    Settings,
    one_of,
)

EPS = 1e-5
ARROW_FORMS = ("svd", "peft")

Eps = Annotated[float, "Added to var(u) under the root when standardising activations u.", POSITIVE]
Temperature = Annotated[float, "Divides scores before the softmax.", POSITIVE]


@dataclass(frozen=True)
class NoSettings(Settings):
    """For routers that have none of their own."""


@dataclass(frozen=True)
class Random(Settings):
    """Router random."""

    seed: Annotated[int, "Seed of the draws.", SEED] = 0


@dataclass(frozen=True)
class Phatgoose(Settings):
    """Routers phatgoose and average-activation."""

    eps: Eps = EPS
    temperature: Temperature = 1.0


@dataclass(frozen=True)
class Arrow(Settings):
    """Router arrow."""

    form: Annotated[str, "The variant: svd (the paper's) or peft.", one_of(ARROW_FORMS)] = "svd"
    temperature: Temperature = 1.0


@dataclass(frozen=True)
class Spectr(Settings):
    """Router spectr."""

    shortlist: Annotated[
        int | None, "Experts to choose among, the best by Arrow's scores; default: all.", AT_LEAST_1
    ] = None


@dataclass(frozen=True)
class Retrieval(Settings):
    """Router retrieval."""

    form: Annotated[
        str,
        "What is embedded: the prompt or, for experts with embeddings of that form, the paper's "
        "text: answer choices, then the input (paper; only in comparisons).",
        one_of(EMBEDDING_FORMS),
    ] = "prompt"
    temperature: Temperature = 0.2


@dataclass(frozen=True)
class Centroid(Settings):
    """Router centroid."""

    temperature: Temperature = 0.2


@dataclass(frozen=True)
class Discriminant(Settings):
    """Router discriminant."""

    shrinkage: Annotated[
        float, "How far the experts' covariance is shrunk to its diagonal.", RATIO
    ] = 0.3
    task_variance: Annotated[
        float,
        "Assumed distance of a new wording or task from an expert's own, as a share of the "
        "distance between the experts' tasks.",
        NOT_NEGATIVE,
    ] = 1.0
    per_block: Annotated[
        float,
        "How much a block's own statistics decide which experts act in it: 0 is one choice for the "
        "whole model, by the mean over blocks; 1 lets each block choose alone.",
        RATIO,
    ] = 0.0
    temperature: Temperature = 0.1


@dataclass(frozen=True)
class FewShot(Settings):
    """Router few-shot."""

    examples: Annotated[
        str | None,
        "A task file (.jsonl, .json, .csv, .parquet) of five or more inputs, with or without "
        "targets and choices.",
    ] = None
    by: Annotated[
        str | None,
        "The router that scores its prompts: discriminant, retrieval or centroid; default: "
        "discriminant or centroid, as experts allow.",
        one_of(("discriminant", "retrieval", "centroid")),
    ] = None
    shortlist: Annotated[
        int, "Experts compared by targets, in addition to the base.", AT_LEAST_1
    ] = 5


@dataclass(frozen=True)
class Single(Settings):
    """Router single."""

    expert: Annotated[str | None, "The expert's name; a pool of one needs none."] = None


@dataclass(frozen=True)
class Weights(Settings):
    """Router weights, whose settings are experts' names: weights:reviews=0.7,trivia=0.3."""

    mixture: Annotated[
        str | None,
        "Each expert and its weight, NAME=WEIGHT; requests to a server may bring their own.",
    ] = None
