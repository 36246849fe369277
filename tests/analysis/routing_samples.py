"""Analyses of no model at all: made-up routing, for figures, pages and measures of any size."""

from collections.abc import Sequence

import numpy as np

from phatgoose.analysis.distribution import RoutingDistribution

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


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
