"""Analyses of no model at all: made-up routing, for figures, pages and measures of any size."""

from collections.abc import Sequence

import numpy as np

from phatgoose.analysis.analyse import Analysis, RouterAnalysis
from phatgoose.analysis.distribution import RoutingDistribution, site_label
from phatgoose.analysis.measures import Finding
from phatgoose.analysis.traces import Trace, TraceStream
from phatgoose.evaluation.evaluate import TaskScore
from phatgoose.evaluation.metrics import Sample

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
WORDS = ("The", "heron", "saw", "seven", "ducks", ",", "none", "was", "a", "goose", ".\n")
DATASETS = ("reviews", "trivia")


def site_names(stacks: Sequence[str], layers: int) -> list[str]:
    """Sites of every kind in each stack ("" for a model of one)."""
    prefixes = [f"{stack}.block" if stack else "model.layers" for stack in stacks]
    return [f"{p}.{layer}.{kind}" for p in prefixes for layer in range(layers) for kind in KINDS]


def names_of(experts: int) -> tuple[str, ...]:
    few = ("ag_news", "commonsense_qa", "paws", "qasc", "trec", "glue_qqp", "social_i_qa", "cg")
    return few[:experts] if experts <= 8 else tuple(f"task_number_{z:03}" for z in range(experts))


def make_profile(
    experts: int, stacks: Sequence[str] = ("",), layers: int = 4, seed: int = 0
) -> RoutingDistribution:
    """A profile in which some experts like some layers."""
    draw = np.random.default_rng(seed)
    sites = site_names(stacks, layers)
    liking = draw.dirichlet(np.full(experts, 0.3 if experts < 20 else 0.05), size=len(sites))
    smooth = np.stack([liking[max(0, i - 6) : i + 7].mean(axis=0) for i in range(len(sites))])
    tokens = {site: np.array([400.0, 60.0]) for site in sites}
    sums = {site: tokens[site][:, None] * row for site, row in zip(sites, smooth, strict=True)}
    measures = {name: sums for name in ("probability", "weight", "chosen", "first")}
    entropies = {site: tokens[site] * 0.9 for site in sites}
    return RoutingDistribution(names_of(experts), tokens, measures, entropies)


def make_trace(
    experts: int, tokens: int, stacks: Sequence[str], layers: int, seed: int = 0
) -> Trace:
    """A trace of two experts a token and site, that differ from layer to layer."""
    draw = np.random.default_rng(seed)
    streams = []
    for stack in stacks:
        places = tuple(site_label(site) for site in site_names([stack], layers))
        pieces = [WORDS[i % len(WORDS)] for i in range(tokens)]
        shape = (tokens, len(places))
        first = (draw.zipf(1.6, size=shape) + np.arange(len(places)) // 8) % experts
        second = (first + 1 + draw.integers(experts - 1, size=shape)) % experts
        weight = draw.integers(128, 250, size=shape)
        streams.append(
            TraceStream(
                stack or "decoder",
                tuple(piece if i == 0 else f" {piece}" for i, piece in enumerate(pieces)),
                tuple(int(i > tokens * 0.8) for i in range(tokens)),
                places,
                np.stack([first, second], axis=-1).astype(np.uint16),
                np.stack([weight, 255 - weight], axis=-1).astype(np.uint8),
            )
        )
    return Trace(names_of(experts), "phatgoose", tuple(streams))


def scored(dataset: str, score: float) -> TaskScore:
    """Fifty answers, of which that share is right."""
    sample = Sample.of(["accuracy"], [[[float(i < 50 * score)]] for i in range(50)])
    return TaskScore(dataset, "accuracy", score - 0.1, score + 0.1, sample)


def make_analysis(
    experts: int, *, layers: int, stacks: Sequence[str] = ("",), tokens: int = 40
) -> Analysis:
    names, routers = names_of(experts), {}
    for index, router in enumerate(("phatgoose", "arrow")):
        routers[router] = RouterAnalysis(
            {
                d: make_profile(experts, stacks, layers, 10 * index + i)
                for i, d in enumerate(DATASETS)
            },
            {d: scored(d, score) for d, score in zip(DATASETS, (0.5, 0.62), strict=True)},
            (Finding("never-wins", f"{names[-1]} never wins <anything>.", (names[-1],)),),
            {d: [make_trace(experts, tokens, stacks, layers, i)] for i, d in enumerate(DATASETS)},
        )
    oracle = {d: names[i % experts] for i, d in enumerate(DATASETS)}
    return Analysis(names, DATASETS, routers, oracle)
