"""Routers: which experts act on a token at a site, and how much (METHOD sections 4 and 5).

name                how experts are chosen                               needs            k
phatgoose           scored: gate against activation, both standardised   gates            k
average-activation  scored: mean activation in the gate's place          means            k
arrow               scored: first right singular vector of B A           -                k
uniform-top-k       phatgoose's experts with equal weights               gates            k
phatgoose-input     looked up: the expert whose gates an input fits best gates, means     1
retrieval           looked up: the expert of the nearest training input  embeddings       1
oracle              looked up: the best expert of the task               scores           1
merged              constant: the mean of all B A                        -                all
single              constant: the expert named in `expert`               -                1
best-individual     constant: the expert with the best mean score        scores           1
random              drawn for each token                                 -                k

A router is a module per site that answers every token with a `RoutingDecision`. The looked-up ones
share one `Lookup` over all sites.
"""

from __future__ import annotations

import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...config import Routing
from ...errors import ConfigError, PoolError
from ...experts.expert import Expert
from ...experts.pool import Pool
from ...files.quoting import shortened
from ...tasks.embeddings import usable_embedder
from .decision import RoutingDecision
from .fixed.unscored import RandomRouter, UniformRouter
from .per_input.lookup import LookedUpRouter, Lookup, PromptReader, Retriever, TaskTable
from .per_input.phatgoose_input import GateVote
from .per_token.affinities import (
    AFFINITIES,
    NEED_MEANS,
    PAPER,
    CentredRouter,
    RawRouter,
    TrimmedRouter,
    affinity_router,
    affinity_vectors,
)
from .per_token.arrow import ARROW_VARIANTS, arrow_vector
from .per_token.scored import (
    ArrowRouter,
    ScoredRouter,
    UniformTopKRouter,
    VectorRouter,
    standardise,
)
from .per_token.stand_in import gates_or_stand_ins
from .scores import Scores, best_expert, best_expert_by_task

__all__ = [
    "AFFINITIES",
    "ARROW_VARIANTS",
    "MERGED",
    "NEED_MEANS",
    "ROUTERS",
    "VOTED",
    "ArrowRouter",
    "CentredRouter",
    "Embeddings",
    "GateVote",
    "LookedUpRouter",
    "Lookup",
    "PromptReader",
    "RandomRouter",
    "RawRouter",
    "Retriever",
    "RoutingDecision",
    "ScoredRouter",
    "TaskTable",
    "TrimmedRouter",
    "UniformRouter",
    "UniformTopKRouter",
    "VectorRouter",
    "check_choices",
    "check_routing",
    "check_vectors",
    "columns_of",
    "embeddings_of",
    "make_lookup",
    "make_router",
    "narrow_pool",
    "router_vectors",
    "standardise",
    "warn_of_untrained",
]

STANDARDISED = {"phatgoose": "gates", "average-activation": "means", "uniform-top-k": "gates"}
SCORED = (*STANDARDISED, "arrow")
VOTED = "phatgoose-input"
LOOKED_UP = (VOTED, "retrieval", "oracle")
ALONE = ("single", "best-individual")
MERGED, RANDOM = "merged", "random"
ROUTERS = (*SCORED, *LOOKED_UP, MERGED, *ALONE, RANDOM)
USE_K = (*SCORED, RANDOM)


def check_routing(routing: Routing, pool: Pool) -> None:
    """Refuse a routing that can't be; warn of what is lowered or guessed.

    That is `k` when it exceeds the pool, and gates that others stand in for. Raises ConfigError
    when it names something unknown, PoolError naming the experts that lack the vectors or factors
    that it needs.
    """
    check_choices(routing)
    if routing.expert is not None and routing.router != "single":
        raise ConfigError(f"expert is for router single; the router is {routing.router}.")
    if routing.affinity != PAPER and (routing.router == "uniform-top-k" or routing.stand_in):
        what = "stand-ins for gates" if routing.stand_in else "router uniform-top-k"
        raise ConfigError(f"affinity is {routing.affinity!r}, but {what} can only be {PAPER}.")
    check_vectors(routing, pool)
    if routing.k > len(pool) and routing.router in USE_K and routing.arrow != "mttl":
        warnings.warn(
            f"k is {routing.k}, but the pool has {len(pool)} experts; k is lowered.", stacklevel=3
        )
    guessed = [expert for expert in pool.experts if not expert.gates]
    if routing.stand_in and guessed and STANDARDISED.get(routing.router) == "gates":
        warnings.warn(
            f"Without gates, and routed by their Arrow vectors in the gates' place: "
            f"{', '.join(expert.name for expert in guessed)}. That is a guess; train gates with "
            f"'phatgoose gate' where there are data.",
            stacklevel=3,
        )


def check_choices(routing: Routing) -> None:
    """Raise ConfigError when `routing` names a router, an affinity or a form that there isn't."""
    for name, value, known in (
        ("router", routing.router, ROUTERS),
        ("arrow", routing.arrow, ARROW_VARIANTS),
        ("affinity", routing.affinity, AFFINITIES),
    ):
        if value not in known:
            raise ConfigError(
                f"{name} is {shortened(value)}, but must be one of {', '.join(known)}."
            )


def columns_of(routing: Routing, n: int) -> int | None:
    """How many columns the vectors of `routing` have at a site of n inputs, None for no vectors."""
    if routing.router not in SCORED:
        return None
    scored = routing.router in ("phatgoose", "average-activation")
    return n + 1 if scored and routing.affinity == "centred" else n


def check_vectors(routing: Routing, pool: Pool) -> None:
    """Raise PoolError unless the experts of `pool` have the vectors that `routing` scores with.

    Or what these are made of: the factors of LoRAs for arrow, and for gates that others stand in
    for.
    """
    kind = STANDARDISED.get(routing.router)
    if routing.router == "arrow":
        _refuse_without_factors(pool.experts, "Router arrow goes by")
    elif kind == "gates" and routing.stand_in:
        ungated = [expert for expert in pool.experts if not expert.gates]
        _refuse_without_factors(ungated, "Stand-ins for gates are made of")
    elif routing.router == VOTED:
        pool.check_vectors("gates")
        pool.check_vectors("means")
    elif kind is not None:
        pool.check_vectors(kind)
        if routing.affinity in NEED_MEANS:
            pool.check_vectors("means")


def narrow_pool(pool: Pool, routing: Routing, scores: Scores | None) -> Pool:
    """The experts that `routing` can ever choose: one for single and best-individual, else all.

    Raises PoolError when the expert is not in the pool or not named, ConfigError without `scores`
    where they are needed.
    """
    if routing.router == "single":
        if routing.expert is None and len(pool) > 1:
            raise PoolError(
                f"Router single needs the name of its expert: one of {', '.join(pool.names)}."
            )
        return pool.select([routing.expert or pool.names[0]])
    if routing.router == "best-individual":
        return pool.select([best_expert(_wanted(scores, routing), pool.names)])
    return pool


def _wanted(scores: Scores | None, routing: Routing) -> Scores:
    if scores is None:
        raise ConfigError(
            f"Router {routing.router} needs the scores of every single expert: those of a finished "
            f"'phatgoose compare' (--scores comparison.json)."
        )
    return scores


def router_vectors(pool: Pool, site: str, routing: Routing) -> Tensor | None:
    """The vectors [E, n] that the router scores with at `site`, None if it has none.

    They are divided by the temperature, which divides their products with anything. Affinity
    centred has a column more (`per_token.affinities`).
    """
    kind = STANDARDISED.get(routing.router)
    if kind == "gates" and routing.stand_in:
        vectors = gates_or_stand_ins(pool, site)
    elif kind is not None:
        vectors = affinity_vectors(pool, site, kind, routing.affinity)
    elif routing.router == "arrow":
        factors = [expert.lora[site] for expert in pool.experts if site in expert.lora]
        vectors = torch.stack([arrow_vector(lora, routing.arrow) for lora in factors])
    else:
        return None
    return vectors if routing.router_temperature == 1 else vectors / routing.router_temperature


def _refuse_without_factors(experts: Sequence[Expert], what: str) -> None:
    """Raise PoolError naming those of `experts` that are no LoRAs, if any; `what` needs factors."""
    named = [f"{expert.name!r} ({expert.kind})" for expert in experts if not expert.lora]
    if named:
        raise PoolError(
            f"{what} the factors of LoRAs, and there are none in {', '.join(named)}: leave these "
            f"out, or use another router."
        )


def make_lookup(
    pool: Pool,
    routing: Routing,
    scores: Scores | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Lookup | None:
    """What a looked-up router's sites share, None for the other routers.

    Raises PoolError when an expert has no embeddings or two were made by different embedders,
    ConfigError without the `scores` or `tokenizer` that are needed, or with an embedder that must
    be named or can't be loaded.
    """
    if routing.router == "oracle":
        best = best_expert_by_task(_wanted(scores, routing), pool.names)
        return TaskTable({task: pool.names.index(expert) for task, expert in best.items()})
    if routing.router not in LOOKED_UP:
        return None
    if tokenizer is None:
        raise ConfigError(
            f"Router {routing.router} reads prompts; hand the base over with its tokenizer."
        )
    if routing.router == VOTED:
        return GateVote(GateVote.votes_of(pool), len(pool), routing.eps, tokenizer)
    found = embeddings_of(pool)
    embedder = usable_embedder(found.embedder, routing.retrieval_embedder)
    return Retriever(found.rows, found.owners, embedder, tokenizer)


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of training inputs, `rows` [M, dims], by `embedder`, and their experts [M]."""

    rows: Tensor
    owners: Tensor
    embedder: str


def embeddings_of(pool: Pool, embedder: str | None = None) -> Embeddings:
    """Those of all experts of `pool`; `owners` are indices in it.

    Raises PoolError when an expert has none or they come from several embedders, or from another
    than `embedder`.
    """
    rows = [_embeddings(expert) for expert in pool.experts]
    kinds = {
        (str(expert.info.embedder), row.shape[1])
        for expert, row in zip(pool.experts, rows, strict=True)
    }
    if len(kinds) > 1:
        raise PoolError(
            f"The experts' embeddings come from several embedders and can't be compared: {kinds}."
        )
    found = kinds.pop()[0]
    if embedder not in (None, found):
        raise PoolError(f"The experts' embeddings come from {found}, those there from {embedder}.")
    owners = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
    unit = torch.nn.functional.normalize(torch.cat(rows).float(), dim=-1)
    return Embeddings(unit, owners, found)


def _embeddings(expert: Expert) -> Tensor:
    if expert.embeddings is None or expert.info.embedder is None:
        lacks = "embeddings" if expert.embeddings is None else "record of its embedder"
        raise PoolError(
            f"Expert {expert.name!r} has no {lacks}; run 'phatgoose measure' on it or leave it out."
        )
    return expert.embeddings


def make_router(
    site: str,
    experts: Tensor,
    pool_size: int,
    routing: Routing,
    vectors: Tensor | None,
    lookup: Lookup | None,
) -> nn.Module:
    """The router module of `site`, at which the pool's `experts` [E] (indices) act."""
    if lookup is not None:
        return LookedUpRouter(experts, pool_size, lookup)
    if vectors is not None:
        if routing.router == "arrow":
            return ArrowRouter(vectors, len(vectors) if routing.arrow == "mttl" else routing.k)
        if routing.router == "uniform-top-k":
            return UniformTopKRouter(vectors, routing.k, routing.eps)
        return affinity_router(vectors, routing.affinity, routing.k, routing.eps)
    if routing.router == RANDOM:
        return RandomRouter(
            len(experts), routing.k, routing.router_seed + zlib.crc32(site.encode())
        )
    return UniformRouter(len(experts), pool_size)


def warn_of_untrained(pool: Pool, router: str, flat: Mapping[str, Tensor]) -> None:
    """Warn once of each expert whose vectors have no direction: where `flat`, by site [E], is."""
    found = Counter[str]()
    for site, rows in flat.items():
        if rows.any():
            present = [expert.name for expert in pool.experts if site in expert.modules]
            found.update(present[row] for row in rows.nonzero().flatten().tolist())
    for name in pool.names:
        if found[name]:
            warnings.warn(
                f"Expert {name!r} has a constant vector for router {router!r} at {found[name]} of "
                f"{len(flat)} sites (never trained?); it scores 0 there.",
                stacklevel=3,
            )
