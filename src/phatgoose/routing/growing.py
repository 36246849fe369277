"""Experts that join and leave a routed model, without reading those that stay.

Afterwards the model is, bit for bit, what composing the new pool from the start would have made. A
site's stack grows into spare rows, which are made when they run out (`GROWTH`), so that adding
costs what is added and, now and then, a copy; removing copies the rows that stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..base.fingerprint import BaseReference, check_base
from ..base.sites import Site, check_in_place, find_sites
from ..config import closest
from ..errors import PoolError, RoutingError
from ..experts.pool import Pool
from . import stacks
from .compose import check_acting, check_pool_fits, detach, install, routed_layer, stack_at
from .composition import Composition, composition_of
from .layers import FoldedLinear, RoutedLayer, RoutedLinear
from .routers.prompt_router import ByPrompt
from .routers.router import Router, check_measured, warn_of_lowered_k


def add_experts(model: PreTrainedModel, pool: Pool | str | Path) -> PreTrainedModel:
    """The routed `model` with the experts of `pool` too, after its own; changed in place.

    Raises RoutingError when it isn't routed or its router can't take more (`check_growth`),
    PoolError when a name is taken or vectors are missing, WrongBaseError and ExpertError when an
    expert doesn't fit the base. It is as it was then.
    """
    parts = composition_of(model)
    pool = Pool.open(pool)
    check_growth(parts.router, parts.records, pool, parts.base, folded=_has_folded(parts))
    check_in_place(parts.layers.values())
    # Sites are those of the plain base; whatever fails below puts the old layers back.
    detach(model)
    try:
        sites = find_sites(model)
        check_pool_fits(pool, sites)
        check_acting(pool, is_encoder_decoder=bool(model.config.is_encoder_decoder))
        router, prompt_router = parts.router, parts.prompt_router
        if isinstance(router, ByPrompt) and prompt_router is not None:
            prompt_router = router.grown(prompt_router, pool)
        added = {name: stack_at(model, name, pool) for name in pool.sites}
        states = {name: parts.router.state_at(pool, name) for name in pool.sites}
        pool.release()
        grown = replace(
            parts,
            experts=(*parts.experts, *pool.names),
            records=[*parts.records, *pool.records()],
            layers={},
            prompt_router=prompt_router,
        )
        for name in dict.fromkeys((*parts.layers, *added)):
            grown.layers[name] = _grown(
                model, sites[name], parts, grown, added.pop(name, None), states.get(name, {})
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
    left = check_removal(parts.router, parts.experts, names, folded=_has_folded(parts))
    check_in_place(parts.layers.values())
    place = stacks.renumbered(torch.tensor(left), len(parts.experts))
    router, prompt_router = parts.router, parts.prompt_router
    if isinstance(router, ByPrompt) and prompt_router is not None:
        prompt_router = router.shrunk(prompt_router, place)
    smaller = replace(
        parts,
        experts=tuple(parts.experts[z] for z in left),
        records=[parts.records[z] for z in left],
        layers={},
        prompt_router=prompt_router,
    )
    for name, layer in parts.layers.items():
        shrunk = _shrunk(layer, smaller, place)
        if shrunk is not None:
            smaller.layers[name] = shrunk
    return install(detach(model), smaller)


# Who may join and leave, in memory and in a saved model (`saved.change`).


def check_growth(
    router: Router,
    records: Sequence[Mapping[str, Any]],
    pool: Pool,
    base: BaseReference,
    *,
    folded: bool,
) -> None:
    """Raise unless `pool` can join experts of these `records` on `base`.

    RoutingError for a router that can't grow and for `folded` experts, PoolError for a name that is
    taken, vectors that are missing or statistics that can't be compared, WrongBaseError for another
    base.
    """
    _check_changeable(router, folded)
    taken = sorted({record["name"] for record in records} & set(pool.names))
    if taken:
        raise PoolError(f"An expert named {taken[0]!r} is there already; rename one.")
    router.check(pool)
    check_measured(router, pool, [*records, *pool.records()])
    check_base(pool.base, base)


def check_removal(
    router: Router, names: tuple[str, ...], leaving: Iterable[str], *, folded: bool
) -> list[int]:
    """The indices of the experts that stay of these `names`. Raises as `remove_experts` does."""
    _check_changeable(router, folded)
    if isinstance(leaving, str):
        raise PoolError("What is to be removed must be a list of names.")
    gone = set(leaving)
    for name in sorted(gone - set(names)):
        hint = closest(name, names)
        raise PoolError(f"There is no expert {name!r}; there are {', '.join(names)}.{hint}")
    left = [z for z, name in enumerate(names) if name not in gone]
    if not left:
        raise PoolError("No expert would be left.")
    warn_of_lowered_k(router, len(left), "the pool then has", stacklevel=4)
    return left


def _check_changeable(router: Router, folded: bool) -> None:
    if router.why_fixed is not None:
        raise RoutingError(router.why_fixed)
    if folded:
        raise RoutingError(
            "The merged experts are folded into the base's weights and can't be separated any "
            "more; compose the pool again."
        )


def _has_folded(parts: Composition) -> bool:
    return any(isinstance(layer, FoldedLinear) for layer in parts.layers.values())


def _grown(
    model: PreTrainedModel,
    site: Site,
    old: Composition,
    new: Composition,
    added: stacks.SiteStack | None,
    state: Mapping[str, Tensor],
) -> RoutedLayer:
    layer = old.layers.get(site.name)
    if added is not None:
        added = replace(added, experts=added.experts + len(old.experts))
    if not isinstance(layer, RoutedLinear):
        return _layer(model.get_submodule(site.name), site, added, state, new)
    known, room = layer.router.state(), layer.room
    if added is None:
        return _layer(layer.base, site, layer.stack, known, new, room)
    # Spare rows may be written although the old layer is a view of the same memory: it ends before
    # them.
    if layer.stack.plain_lora and added.plain_lora:  # into spare rows, without a copy of the others
        room = {
            name: stacks.appended(rows, added.tensors()[name], room.get(name))
            for name, rows in layer.stack.tensors().items()
        }
        experts = torch.cat([layer.experts, added.experts])
        stack = stacks.SiteStack.of(
            {name: rows[: len(experts)] for name, rows in room.items()}, experts
        )
        return _layer(layer.base, site, stack, stacks.joined_state([known, state]), new, room)
    part = stacks.joined_parts([stacks.SitePart(layer.stack, known), stacks.SitePart(added, state)])
    return _layer(layer.base, site, *part, new, {})


def _shrunk(layer: RoutedLayer, new: Composition, place: Tensor) -> RoutedLayer | None:
    if not isinstance(layer, RoutedLinear):
        return None
    part = stacks.kept_part(stacks.SitePart(layer.stack, layer.router.state()), place)
    return part and _layer(layer.base, layer.site, *part, new, layer.room)


def _layer(
    base: Any,
    site: Site,
    stack: stacks.SiteStack | None,
    state: Mapping[str, Tensor],
    parts: Composition,
    room: Mapping[str, Tensor] | None = None,
) -> RoutedLayer:
    if stack is None:
        raise RoutingError(f"No expert acts at {site.name}.")
    layer = routed_layer(base, site, stack, state, parts, may_fold=False)
    if isinstance(layer, RoutedLinear) and room is not None:
        layer.room = dict(room)
    return layer
