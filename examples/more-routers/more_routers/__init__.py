"""The records of routers for phatgoose, and their settings; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from phatgoose.routing.routers.configs import Centroid, Discriminant, Phatgoose

from phatgoose.config import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, RATIO, Settings, one_of
from phatgoose.routing.routers.registry import RouterSpec


@dataclass(frozen=True)
class CentroidsSettings(Centroid):
    clusters: Annotated[
        int, "Maximum centroids of each expert; the nearest counts.", AT_LEAST_1
    ] = 3


@dataclass(frozen=True)
class GliderSettings(Phatgoose):
    weight: Annotated[
        float, "λ, the weight of the prompt's cosines relative to the gates.", NOT_NEGATIVE
    ] = 3.0


@dataclass(frozen=True)
class LogoSettings(Settings):
    reads: Annotated[
        str,
        "Which input is read: the layer's (site) or its block's (block).",
        one_of(("block", "site")),
    ] = "block"


@dataclass(frozen=True)
class JointSettings(Discriminant):
    embedding_share: Annotated[
        float, "Weight of the embeddings, as opposed to the base's hidden states.", RATIO
    ] = 0.5
    temperature: Annotated[float, "Divides scores before the softmax.", POSITIVE] = 0.05


@dataclass(frozen=True)
class ShortlistSettings(Discriminant, Phatgoose):
    temperature: Annotated[float, "Divides scores before the softmax.", POSITIVE] = 1.0
    shortlist: Annotated[int, "Experts to choose among, for each input.", AT_LEAST_1] = 5
    shortlist_temperature: Annotated[
        float, "Divides the shortlist's scores before their softmax.", POSITIVE
    ] = 0.1
    prior: Annotated[
        float, "Weight of an expert's share of the shortlist, relative to its gates.", NOT_NEGATIVE
    ] = 1.0


CALIBRATED = RouterSpec(
    "calibrated",
    "Calibrated",
    "PHATGOOSE's k experts, by scores relative to each gate's own on neutral text",
    "more_routers.gates.Calibrated",
    needs=("gates",),
    k=2,
    config=Phatgoose,
    grows=False,
)
CENTROIDS = RouterSpec(
    "centroids",
    "Centroids",
    "per prompt, the experts with the nearest of several means of training inputs",
    "more_routers.centroids.Centroids",
    needs=("embeddings",),
    k=3,
    config=CentroidsSettings,
    per_input=True,
)
DISCRIMINANT_PHATGOOSE = RouterSpec(
    "discriminant-phatgoose",
    "Discriminant + PHATGOOSE",
    "PHATGOOSE's k experts, among those that discriminant shortlists for the prompt",
    "more_routers.shortlisted.ByDiscriminant",
    needs=("gates", "readings"),
    k=2,
    config=ShortlistSettings,
)
GLIDER = RouterSpec(
    "glider",
    "GLIDER",
    "PHATGOOSE's scores plus the prompt's similarity to each expert's training inputs",
    "more_routers.glider.Glider",
    needs=("gates", "embeddings"),
    k=2,
    config=GliderSettings,
)
JOINT_DISCRIMINANT = RouterSpec(
    "joint-discriminant",
    "Joint Discriminant",
    "per prompt, the experts with the most similar training prompts, by base and embedder",
    "more_routers.joint_discriminant.JointDiscriminant",
    needs=("readings", "embeddings"),
    k=3,
    config=JointSettings,
    per_input=True,
)
LOGO = RouterSpec(
    "logo",
    "LoGo",
    "per prompt, the experts with the longest updates of one layer at the prompt's end",
    "more_routers.logo.Logo",
    needs=("lora",),
    k=20,
    config=LogoSettings,
    per_input=True,
)
SEQR = RouterSpec(
    "seqr",
    "SEQR",
    "the k experts with the longest updates of the token, relative to neutral text",
    "more_routers.seqr.Seqr",
    needs=("lora",),
    k=1,
    grows=False,
)
UNIFORM_TOP_K = RouterSpec(
    "uniform-top-k",
    "Uniform top-k",
    "PHATGOOSE's k experts with equal weights",
    "more_routers.gates.UniformTopK",
    needs=("gates",),
    k=2,
    config=Phatgoose,
)
