"""The routers' own settings, one class for each router that has some; loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ...config import (
    AT_LEAST_1,
    EMBEDDING_FORMS,
    NOT_NEGATIVE,
    POSITIVE,
    RATIO,
    SEED,
    STAND_IN_LEFT,
    Settings,
    one_of,
)
from ...errors import ConfigError

EPS = 1e-5
STANDARDISED, CALIBRATED = AFFINITIES = ("standardised", "calibrated")
LEFT_AFFINITIES = ("raw", "trimmed", "centred")
ARROW_FORMS = ("svd", "peft", "mttl")
PLACES = ("both", "end", "whole")
LOGO_READS = ("block", "site")

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
class UniformTopK(Settings):
    """Router uniform-top-k."""

    left: ClassVar[Mapping[str, str]] = STAND_IN_LEFT

    eps: Eps = EPS


@dataclass(frozen=True)
class Phatgoose(Settings):
    """Routers phatgoose and average-activation."""

    left: ClassVar[Mapping[str, str]] = STAND_IN_LEFT

    eps: Eps = EPS
    affinity: Annotated[
        str,
        "How gates or means score activations: standardised (paper) or calibrated (less each "
        "expert's mean over neutral text, in units of its deviation there).",
        one_of(AFFINITIES),
    ] = STANDARDISED
    temperature: Temperature = 1.0

    def __post_init__(self) -> None:
        if self.affinity in LEFT_AFFINITIES:
            raise ConfigError(
                f"affinity {self.affinity} has left phatgoose; use calibrated or standardised."
            )
        super().__post_init__()


@dataclass(frozen=True)
class Arrow(Settings):
    """Router arrow."""

    form: Annotated[
        str,
        "The variant: svd (the paper's), peft, or mttl (all experts, mixed factors).",
        one_of(ARROW_FORMS),
    ] = "svd"
    temperature: Temperature = 1.0


@dataclass(frozen=True)
class Spectr(Settings):
    """Router spectr."""

    shortlist: Annotated[
        int | None, "Experts to choose among, the best by Arrow's scores; default: all.", AT_LEAST_1
    ] = None


@dataclass(frozen=True)
class Glider(Settings):
    """Router glider."""

    eps: Eps = EPS
    weight: Annotated[
        float, "λ, the weight of the prompt's cosines relative to the gates.", NOT_NEGATIVE
    ] = 3.0
    temperature: Temperature = 1.0


@dataclass(frozen=True)
class Logo(Settings):
    """Router logo."""

    reads: Annotated[
        str,
        "Which input is read: the layer's (site) or its block's (block).",
        one_of(LOGO_READS),
    ] = "block"


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

    clusters: Annotated[
        int, "Maximum centroids of each expert; the nearest counts.", AT_LEAST_1
    ] = 1
    temperature: Temperature = 0.2


@dataclass(frozen=True)
class Reading(Settings):
    """What routers named after discriminants have in common."""

    place: Annotated[
        str,
        "What is read of a prompt: its end (last token), the whole (mean over tokens), or both.",
        one_of(PLACES),
    ] = "whole"
    first: Annotated[float, "The first block that is read, as a share of the depth.", RATIO] = 0.0
    last: Annotated[float, "The last block that is read, as a share of the depth.", RATIO] = 1.0
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


@dataclass(frozen=True)
class Discriminant(Reading):
    """Router discriminant."""

    temperature: Temperature = 0.1


@dataclass(frozen=True)
class JointDiscriminant(Reading):
    """Router joint-discriminant."""

    embedding_share: Annotated[
        float, "Weight of the embeddings, as opposed to the base's hidden states.", RATIO
    ] = 0.5
    temperature: Temperature = 0.05


@dataclass(frozen=True)
class DiscriminantPhatgoose(Reading, Phatgoose):
    """Router discriminant-phatgoose."""

    shortlist: Annotated[int, "Experts to choose among, for each input.", AT_LEAST_1] = 5
    shortlist_temperature: Annotated[
        float, "Divides the shortlist's scores before their softmax.", POSITIVE
    ] = 0.1
    prior: Annotated[
        float, "Weight of an expert's share of the shortlist, relative to its gates.", NOT_NEGATIVE
    ] = 1.0


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
        "The router that scores its prompts: discriminant, joint-discriminant, retrieval or "
        "centroid; default: discriminant or centroid, as experts allow.",
        one_of(("discriminant", "joint-discriminant", "retrieval", "centroid")),
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
