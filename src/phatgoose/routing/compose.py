"""Composing: a base model and a pool become one transformers model that routes every token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from transformers import PreTrainedModel

from ..base import Base, check_base
from ..config import Routing, RoutingSettings, from_mapping
from ..experts.kind import check_fit
from ..experts.pool import Pool
from ..files import prefetch
from ..sites import (
    ROUTED,
    Site,
    check_in_place,
    dtype_at,
    execution_device,
    find_sites,
    replace_module,
)
from .composition import Composition, composition_of, resolve_base
from .routers.auto import settled
from .routers.prompt import ByPrompt
from .routers.registry import AUTO, WEIGHTS, router_of, written_mixture
from .routers.router import check_routing, warn_of_constant_vectors
from .routers.scores import Scores, read_scores
from .saved import save_pretrained
from .stacks import SiteStack, stack_of

ARGUMENTS = ("keep", "leave_out", "scores", "weights")  # of `compose`, beside routing settings
READ_AT_ONCE = 2**26  # bytes of experts' files in memory, beside the stacks made of them


def compose(
    pool: Pool | str | Path,
    base: Base | PreTrainedModel | str | None = None,
    *,
    routing: Routing | None = None,
    keep: Iterable[str] | None = None,
    leave_out: Iterable[str] | None = None,
    scores: Scores | str | Path | None = None,
    weights: Mapping[str, float] | None = None,
    **settings: Unpack[RoutingSettings],
) -> PreTrainedModel:
    """The base model of `pool` with routed linears: still a PreTrainedModel, changed in place.

    Undo with `detach`. The model has its `tokenizer`, and `phatgoose` says what it is made of.

    Args:
        pool: Experts, as `Pool.open` takes them.
        base: A name, a loaded `Base` or a transformers model; None loads the one that the pool was
            trained on. A transformers model brings no tokenizer, so routers that read prompts need
            a name or a `Base`.
        routing: How experts are chosen; None is `Routing()`.
        keep: Names of experts to use; None is all of them.
        leave_out: Names of experts not to use.
        scores: The single experts' scores, expert -> task -> score, or the comparison.json of a
            comparison: for routers oracle and best-individual.
        weights: The mixture of router weights, expert -> weight.
        **settings: Fields of `routing` by name: `compose(pool, router="arrow:form=peft", k=3)`.
            Router "auto", the default, is the first that base and experts allow (docs/routers.md);
            the model records which.

    Raises:
        WrongBaseError: The base is not the experts' own.
        ExpertError: An expert doesn't fit the base.
        PoolError: An expert is unknown, or lacks vectors, embeddings or scores.
        ConfigError: A setting, router or kernel is unknown.
        RoutingError: The base is routed already.
    """
    routing = routing or Routing()
    given: dict[str, Any] = {**settings}
    if weights is not None:
        mixture = written_mixture(weights)
        given |= {"router": f"{WEIGHTS}:{mixture}" if mixture else WEIGHTS}
    if given:
        routing = from_mapping(Routing, {**vars(routing), **given}, "compose", ARGUMENTS)
    return composed(pool, base, routing, scores=scores, keep=keep, leave_out=leave_out)


def composed(
    pool: Pool | str | Path,
    base: Base | PreTrainedModel | str | None,
    routing: Routing | None,
    *,
    scores: Scores | str | Path | None = None,
    keep: Iterable[str] | None = None,
    leave_out: Iterable[str] | None = None,
    may_fold: bool = True,
) -> PreTrainedModel:
    """`compose` with a `routing`; without `may_fold` no expert is folded into a weight."""
    pool = Pool.open(pool).select(keep, leave_out)
    routing = routing or Routing()
    # Only auto must know the base before the router; others are refused before it is loaded.
    found = resolve_base(base, pool.base) if routing.router == AUTO else None
    router = router_of(settled(routing, pool, found.model, found.tokenizer) if found else routing)
    check_routing(router, pool)
    scores = read_scores(scores) if isinstance(scores, str | Path) else scores
    pool = router.narrow(pool, scores)
    found = found or resolve_base(base, pool.base)
    model = found.model
    check_base(pool.base, found.reference)
    tables = router.tables(pool, scores) if isinstance(router, ByPrompt) else None
    sites = find_sites(model)
    check_pool_fits(pool, sites)
    # Before any layer is replaced: it is the base alone that is read.
    router = router.settled(pool, model, found.tokenizer)
    parts = Composition.on(found, router, pool.names, pool.records(), tables)
    _add_layers(parts, pool, model, sites, may_fold=may_fold)
    parts.install(model)
    model.save_pretrained = partial(save_pretrained, model)
    return model


def check_pool_fits(pool: Pool, sites: Mapping[str, Site]) -> None:
    """Raise ExpertError for an expert that doesn't fit the base's `sites`."""
    for each in pool.experts:
        check_fit(each.name, each.modules, sites, each.gates, each.means)


def _add_layers(
    parts: Composition,
    pool: Pool,
    model: PreTrainedModel,
    sites: Mapping[str, Site],
    *,
    may_fold: bool,
) -> None:
    """Add the routed layer of each site, whose experts are read ahead; warn of constant vectors."""
    constant, read, router = {}, 0, parts.router
    # Sites ahead are read from the disk while this one is checked.

    def stack_at(name: str) -> SiteStack:
        layer = model.get_submodule(name)
        return stack_of(pool, name, dtype_at(layer, model), execution_device(layer))

    stacks = prefetch(stack_at, pool.sites)
    states = prefetch(lambda name: router.table(pool, name), pool.sites)
    for name, stack, state in zip(pool.sites, stacks, states, strict=True):
        if "vectors" in state:
            constant[name] = ~state["vectors"].any(dim=-1)
        parts.add(model.get_submodule(name), sites[name], stack, state, may_fold=may_fold)
        read += sum(tensor.nbytes for tensor in stack.tensors().values())
        # Pages of the experts' files are given back on the way, so that memory goes to the stacks.
        if read > READ_AT_ONCE:
            pool.release()
            read = 0
    pool.release()
    warn_of_constant_vectors(pool, router, constant)


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """The base model again, exactly as it was before `compose`, which changed it in place.

    Args:
        model: A routed model.

    Raises:
        RoutingError: `model` is not routed, or was offloaded after it was composed.
    """
    parts = composition_of(model)
    check_in_place(parts.layers.values())
    if parts.context is not None:
        parts.context.detach()
    for name, layer in parts.layers.items():
        replace_module(model, name, layer.base)
    del model.save_pretrained, model.tokenizer  # the model's own is its class's
    delattr(model, ROUTED)
    return model
