"""Experts joining and leaving a routed model, without a look at those that stay.

Afterwards the model is, bit for bit, what composing the new pool from the start would have made. A
site's stack grows into spare rows, which are made when they run out (`rows.GROWTH`), so that adding
costs what is added, and now and then a copy; taking out copies the rows that stay. No file of the
experts that stay is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..base.fingerprint import check_base
from ..base.offloading import check_in_place
from ..base.sites import Site, find_sites
from ..config import Routing
from ..errors import PoolError, RoutingError
from ..experts.adapter import check_fit
from ..experts.pool import Pool
from .compose import detach, install, routed_layer, stack_at
from .composition import Composition, composition_of
from .layers import ChoosingLayer, FoldedLinear, RoutedLayer, RoutedLinear
from .routers.per_input.lookup import Lookup, Retriever
from .routers.per_token.affinities import NEED_MEANS
from .routers.per_token.scored import VectorRouter
from .routers.registry import ALONE, USE_K, VOTED, check_vectors, embeddings_of, router_vectors
from .stacks.rows import appended, joined, kept, used_rank
from .stacks.site_stack import SiteStack, joined_stacks, kept_stack

__all__ = ["add_experts", "check_growth", "check_removal", "remove_experts"]


def add_experts(model: PreTrainedModel, pool: Pool | str | Path) -> PreTrainedModel:
    """The routed `model` with the experts of `pool` too, after its own; changed in place.

    Raises RoutingError when it isn't routed or its router can't take more (`check_growth`),
    PoolError when a name is taken or vectors are missing, WrongBaseError and ExpertError when an
    expert doesn't fit the base. It is as it was then.
    """
    parts = composition_of(model)
    pool = pool if isinstance(pool, Pool) else Pool.open(pool)
    check_growth(parts.routing, parts.experts, pool)
    _check_unfolded(parts)
    check_in_place(parts.layers.values())
    check_base(pool.base, parts.base)
    detach(model)
    try:
        sites = find_sites(model)
        for expert in pool.experts:
            vectors_of = {"gate": expert.gates, "mean": expert.means}
            check_fit(expert.name, expert.modules, sites, vectors_of)
        lookup = _larger_lookup(parts, pool)
        added = {name: stack_at(model, name, pool) for name in pool.sites}
        vectors = {name: router_vectors(pool, name, parts.routing) for name in pool.sites}
        pool.release()
        grown = replace(
            parts,
            experts=(*parts.experts, *pool.names),
            records=[*parts.records, *pool.records()],
            layers={},
            lookup=lookup,
        )
        for name in dict.fromkeys((*parts.layers, *added)):
            grown.layers[name] = _grown(
                model, sites[name], parts, grown, added.pop(name, None), vectors.get(name)
            )
    except BaseException:
        install(model, parts)
        raise
    return install(model, grown)


def remove_experts(model: PreTrainedModel, names: Iterable[str]) -> PreTrainedModel:
    """The routed `model` without the experts of these `names`; changed in place.

    Layers at which no other expert acts are the base's again. Raises RoutingError when it isn't
    routed or its router can't do with fewer, PoolError for a name that it lacks and when no expert
    would be left. It is as it was then.
    """
    parts = composition_of(model)
    left = check_removal(parts.routing, parts.experts, names)
    _check_unfolded(parts)
    check_in_place(parts.layers.values())
    place = torch.full((len(parts.experts),), -1)
    place[left] = torch.arange(len(left))  # of each expert among those that stay, or -1
    smaller = replace(
        parts,
        experts=tuple(parts.experts[z] for z in left),
        records=[parts.records[z] for z in left],
        layers={},
        lookup=_smaller_lookup(parts.lookup, place),
    )
    for name, layer in parts.layers.items():
        shrunk = _shrunk(layer, smaller, place)
        if shrunk is not None:
            smaller.layers[name] = shrunk
    return install(detach(model), smaller)


def check_growth(routing: Routing, names: Iterable[str], pool: Pool) -> None:
    """Raise unless `pool` can join experts of these `names`, routed so.

    Raises RoutingError for a router that is made for the experts it has (one expert alone, the best
    by scores, with stand-ins for gates), PoolError when a name is taken or experts of `pool` lack
    the vectors needed.
    """
    _check_router(routing)
    taken = sorted(set(names) & set(pool.names))
    if taken:
        raise PoolError(f"An expert named {taken[0]!r} is there already; rename one.")
    check_vectors(routing, pool)


def check_removal(routing: Routing, names: tuple[str, ...], leaving: Iterable[str]) -> list[int]:
    """The indices of the experts that stay of these `names`. Raises as `remove_experts` does."""
    _check_router(routing)
    if isinstance(leaving, str):
        raise PoolError("What is to be removed must be a list of names.")
    gone = set(leaving)
    for name in sorted(gone - set(names)):
        raise PoolError(f"There is no expert {name!r}; there are {', '.join(names)}.")
    left = [z for z, name in enumerate(names) if name not in gone]
    if not left:
        raise PoolError("No expert would be left.")
    if routing.k > len(left) and routing.router in USE_K and routing.arrow != "mttl":
        warnings.warn(
            f"k is {routing.k}, but {len(left)} experts are left; k is lowered.", stacklevel=3
        )
    return left


def _check_router(routing: Routing) -> None:
    if routing.router in (*ALONE, "oracle", VOTED):
        raise RoutingError(
            f"Router {routing.router} is made for the experts that it has; compose the pool anew."
        )
    if routing.stand_in:
        raise RoutingError(
            "Stand-ins for gates depend on the gates of the whole pool; compose it anew."
        )
    if routing.affinity in NEED_MEANS:
        raise RoutingError(
            f"Affinity {routing.affinity} depends on the means of the whole pool; compose it anew."
        )


def _check_unfolded(parts: Composition) -> None:
    if any(isinstance(layer, FoldedLinear) for layer in parts.layers.values()):
        raise RoutingError(
            "The merged experts are folded into the base's weights and can't be told apart any "
            "more; compose the pool anew."
        )


def _grown(
    model: PreTrainedModel,
    site: Site,
    old: Composition,
    new: Composition,
    added: SiteStack | None,
    vectors: Tensor | None,
) -> RoutedLayer:
    """The layer at `site` with what is `added` there, whose experts count on from the old ones."""
    layer = old.layers.get(site.name)
    if added is not None:
        added = replace(added, experts=added.experts + len(old.experts))
    if not isinstance(layer, ChoosingLayer):
        return _layer(model.get_submodule(site.name), site, added, vectors, new)
    room = layer.room if isinstance(layer, RoutedLinear) else {}
    if added is None:
        return _layer(layer.base, site, layer.stack, _vectors(layer), new, room)
    if layer.stack.plain_lora and added.plain_lora:
        room = {
            name: appended(rows, added.tensors()[name], room.get(name))
            for name, rows in layer.stack.tensors().items()
        }
        experts = torch.cat([layer.experts, added.experts])
        stack = SiteStack.of({name: rows[: len(experts)] for name, rows in room.items()}, experts)
    else:
        stack = joined_stacks([layer.stack, added])
    known = _vectors(layer)
    if known is not None and vectors is not None:
        vectors = joined([known, vectors.to(known)])
    return _layer(layer.base, site, stack, vectors, new, room)


def _shrunk(layer: RoutedLayer, new: Composition, place: Tensor) -> RoutedLayer | None:
    """The layer without the experts whose `place` is -1, None if it has no other."""
    places = place.to(layer.experts.device)[layer.experts]
    rows = (places >= 0).nonzero().flatten()
    if not isinstance(layer, ChoosingLayer) or not len(rows):
        return None
    vectors = _vectors(layer)
    vectors = None if vectors is None else kept(vectors, rows)
    if not isinstance(layer, RoutedLinear):
        stack = replace(kept_stack(layer.stack, rows), experts=places[rows])
        return _layer(layer.base, layer.site, stack, vectors, new)
    tensors = {name: kept(tensor, rows) for name, tensor in layer.stack.tensors().items()}
    rank = used_rank(list(tensors.values()))
    tensors = {name: tensor[:, :rank].contiguous() for name, tensor in tensors.items()}
    stack = SiteStack.of(tensors, places[rows])
    return _layer(layer.base, layer.site, stack, vectors, new, layer.room)


def _layer(
    base: Any,
    site: Site,
    stack: SiteStack | None,
    vectors: Tensor | None,
    parts: Composition,
    room: Mapping[str, Tensor] | None = None,
) -> RoutedLayer:
    if stack is None:
        raise RoutingError(f"No expert acts at {site.name}.")
    size = len(parts.experts)
    layer = routed_layer(
        base, site, stack, parts.routing, vectors, parts.lookup, size, may_fold=False
    )
    if isinstance(layer, RoutedLinear) and room is not None:
        layer.room = dict(room)
    return layer


def _vectors(layer: ChoosingLayer) -> Tensor | None:
    return layer.router.vectors if isinstance(layer.router, VectorRouter) else None


def _larger_lookup(parts: Composition, pool: Pool) -> Lookup | None:
    known = parts.lookup
    if not isinstance(known, Retriever):
        return known
    new = embeddings_of(pool, known.embedder)
    owners = joined([known.owners, new.owners + len(parts.experts)])
    embeddings = joined([known.embeddings, new.rows])
    return Retriever(embeddings, owners, known.embedder, known.tokenizer)


def _smaller_lookup(lookup: Lookup | None, place: Tensor) -> Lookup | None:
    if not isinstance(lookup, Retriever):
        return lookup
    owners = place[lookup.owners]
    stay = owners >= 0
    return Retriever(lookup.embeddings[stay], owners[stay], lookup.embedder, lookup.tokenizer)
