"""How a routed model chooses experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .settings import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    RATIO,
    SEED,
    Settings,
    one_of,
    settings_of,
)
from .training import EMBEDDING_FORMS

__all__ = ["AFFINITIES", "ARROW_FORMS", "PAPER", "POOL_SETTINGS", "ROUTING_SETTINGS", "Routing"]

PAPER = "standardised"
AFFINITIES = (PAPER, "raw", "trimmed", "centred", "calibrated")
ARROW_FORMS = ("svd", "peft", "mttl")
READING_PLACES = ("both", "end", "whole")
LOGO_READS = ("block", "site")
KERNELS = ("auto", "reference", "concat", "gather", "grouped", "native", "triton")


@dataclass(frozen=True)
class Routing(Settings):
    """How a routed model chooses experts (paper sections 3 and 4.2)."""

    router: Annotated[str, "Which router chooses experts."] = "phatgoose"
    k: Annotated[int, "Experts per token at each site.", AT_LEAST_1] = 2
    kernel: Annotated[str, f"{', '.join(KERNELS[:-1])} or {KERNELS[-1]}.", one_of(KERNELS)] = "auto"
    eps: Annotated[
        float, "Added to var(u) under the root when standardising activations u.", POSITIVE
    ] = 1e-5
    expert: Annotated[str | None, "Expert to use with router single."] = None
    arrow: Annotated[
        str, "Variant of router arrow: svd (the paper's), peft or mttl.", one_of(ARROW_FORMS)
    ] = "svd"
    spectr_shortlist: Annotated[
        int | None,
        "Router spectr chooses among so many by Arrow's scores; default: all.",
        AT_LEAST_1,
    ] = None
    logo_reads: Annotated[
        str,
        "Router logo reads what enters its block, or its site: block, site.",
        one_of(LOGO_READS),
    ] = "block"
    glider_lambda: Annotated[
        float, "How much router glider makes of whole inputs, beside its gates.", NOT_NEGATIVE
    ] = 3.0
    router_seed: Annotated[int, "Seed of router random.", SEED] = 0
    stand_in: Annotated[
        bool, "Use the Arrow vector of an expert that has no gates, which is a guess."
    ] = False
    affinity: Annotated[
        str,
        "How gates or means score activations: standardised (paper), raw, trimmed, centred or "
        "calibrated (on neutral text).",
        one_of(AFFINITIES),
    ] = "standardised"
    router_temperature: Annotated[float, "Divides affinities before the softmax.", POSITIVE] = 1.0
    retrieval_embedder: Annotated[
        str | None, "Embedder of routers that use one, where it isn't the default one."
    ] = None
    retrieval_form: Annotated[
        str,
        "What router retrieval embeds: the prompt, or in comparisons the paper's text, the input "
        "behind its answer choices (paper), for experts with embeddings of that form.",
        one_of(EMBEDDING_FORMS),
    ] = "prompt"
    reading_place: Annotated[
        str,
        "What router discriminant reads of a prompt: its end (last token), the whole (mean over "
        "tokens), or both.",
        one_of(READING_PLACES),
    ] = "both"
    reading_from: Annotated[
        float, "The first block that it reads, as a share of the depth.", RATIO
    ] = 0.0
    reading_to: Annotated[
        float, "The last block that it reads, as a share of the depth.", RATIO
    ] = 1.0
    shrinkage: Annotated[
        float, "How far it shrinks the experts' covariance to its diagonal.", RATIO
    ] = 0.3
    task_variance: Annotated[
        float,
        "How far it takes a new task to lie from an expert's own, as a share of how far the "
        "experts' tasks lie apart.",
        NOT_NEGATIVE,
    ] = 0.0
    embedding_share: Annotated[
        float,
        "How far router joint-discriminant goes by embeddings rather than by the base's readings.",
        RATIO,
    ] = 0.5
    prior: Annotated[
        float,
        "On a shortlist (discriminant-phatgoose, phatgoose-evidence): how much an expert's share "
        "of the input counts beside its gates.",
        NOT_NEGATIVE,
    ] = 1.0
    input_k: Annotated[
        int | None, "Experts per input, where a router chooses so; default: its own.", AT_LEAST_1
    ] = None
    input_temperature: Annotated[
        float | None, "Divides scores of inputs before their softmax; default: its own.", POSITIVE
    ] = None

    @property
    def changed(self) -> frozenset[str]:
        """The names of the settings that aren't the usual ones."""
        usual = vars(Routing())
        return frozenset(name for name, value in vars(self).items() if value != usual[name])


ROUTING_SETTINGS = frozenset(setting.name for setting in settings_of(Routing))
# A saved model has its routing already; only where its embedder is may be told anew.
POOL_SETTINGS = ROUTING_SETTINGS - {"retrieval_embedder"}
