"""Experts that join and leave a routed model, without reading those that stay.

Afterwards the model is, bit for bit, what composing the new pool from the start would have made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..base import BaseReference, check_base
from ..config import closest
from ..errors import PoolError, RoutingError
from ..experts.pool import Pool
from ..sites import Site, check_in_place, find_sites
from .compose import check_acting, check_pool_fits, detach, install, routed_layer, stack_at
from .composition import Composition, composition_of
from .layers import FoldedLinear, RoutedLayer, RoutedLinear
from .routers.prompt_router import ByPrompt
from .routers.router import Router, check_measured, warn_of_lowered_k
from .stacks import SitePart, grown_parts, kept_part, renumbered


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
        new = {
            name: SitePart(stack_at(model, name, pool), router.state_at(pool, name))
            for name in pool.sites
        }
        pool.release()
        joined = grown_parts(_stacked(parts), new, len(parts.experts))
        grown = replace(
            parts,
            experts=(*parts.experts, *pool.names),
            records=[*parts.records, *pool.records()],
            layers={},
            prompt_router=prompt_router,
        )
        for name, part in joined.items():
            grown.layers[name] = _layer(model.get_submodule(name), sites[name], part, grown)
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
    place = renumbered(torch.tensor(left), len(parts.experts))
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
    for name, held in _stacked(parts).items():
        if (part := kept_part(held, place)) is not None:
            layer = parts.layers[name]
            smaller.layers[name] = _layer(layer.base, layer.site, part, smaller)
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


def _stacked(parts: Composition) -> dict[str, SitePart]:
    return {
        name: SitePart(layer.stack, layer.router.state())
        for name, layer in parts.layers.items()
        if isinstance(layer, RoutedLinear)
    }


def _layer(base: Any, site: Site, part: SitePart, parts: Composition) -> RoutedLayer:
    return routed_layer(base, site, *part, parts, may_fold=False)
