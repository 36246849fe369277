"""Composing: a base model and a pool become one transformers model that routes every token.

And opening any place: a routed model's folder, a pool, a base.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base import Base, closest_beside, load_base
from ..config import Routing, RoutingSettings, from_mapping
from ..errors import ConfigError
from ..experts.hub import HubReference
from ..experts.kind import check_fit
from ..experts.pool import Pool
from ..files import prefetch
from ..sites import (
    ROUTED,
    Site,
    dtype_at,
    find_sites,
    replace_module,
)
from .composition import Composition, composition_of, resolve_base
from .routers.auto import BY_PROMPT, first_allowed, settled
from .routers.fixed import read_scores
from .routers.prompt import ByPrompt, PromptRouter
from .routers.registry import AUTO, WEIGHTS, router_of, written_mixture
from .routers.router import Scores, check_routing, check_served
from .saved import CONFIG, ROUTED_INFO, load, read_saved, save_pretrained
from .stacks import SiteStack, stack_of

ARGUMENTS = ("scores", "weights")  # of `compose`, beside routing settings
READ_AT_ONCE = 2**26  # bytes of experts' files in memory, beside the stacks made of them


def compose(
    pool: Pool | str | Path,
    base: Base | PreTrainedModel | str | None = None,
    *,
    routing: Routing | None = None,
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
    if weights is not None:
        settings["router"] = ":".join(filter(None, (WEIGHTS, written_mixture(weights))))
    routing = _routing(routing, settings, "compose", *ARGUMENTS)
    pool = Pool.open(pool)
    loaded = resolve_base(base, pool.base)
    model, tokenizer = loaded.model, loaded.tokenizer
    if routing.router == AUTO:
        routing = settled(routing, pool, model, tokenizer)
    router = router_of(routing)
    check_routing(router, pool)
    scores = read_scores(scores) if isinstance(scores, str | Path) else scores
    pool = router.narrow(pool, scores)
    tables = router.tables(pool, scores) if isinstance(router, ByPrompt) else None
    sites = find_sites(model)
    for each in pool.experts:
        check_fit(each.name, each.modules, sites, each.gates, each.means)
    # Before any layer is replaced: it is the base alone that is read.
    router = router.settled(pool, model, tokenizer)
    parts = Composition(loaded, router, pool.names, pool.records(), tables)
    _add_layers(parts, pool, model, sites)
    parts.install(model)
    model.save_pretrained = partial(save_pretrained, model)
    return model


def _routing(
    routing: Routing | None, settings: Mapping[str, Any], where: str, *others: str
) -> Routing:
    return from_mapping(Routing, {**vars(routing or Routing()), **settings}, where, others)


def _add_layers(
    parts: Composition, pool: Pool, model: PreTrainedModel, sites: Mapping[str, Site]
) -> None:
    """Add the routed layer of each site, whose experts are read ahead."""
    read = 0
    # Sites ahead are read from the disk while this one is checked.

    def stack_at(name: str) -> SiteStack:
        layer = model.get_submodule(name)
        return stack_of(pool, name, dtype_at(layer, model), layer.weight.device)

    stacks = prefetch(stack_at, pool.sites)
    states = prefetch(lambda name: parts.router.table(pool, name), pool.sites)
    for name, stack, state in zip(pool.sites, stacks, states, strict=True):
        layer = model.get_submodule(name)
        if not parts.folded(layer, sites[name], stack):
            parts.add(layer, sites[name], stack, state)
        read += sum(tensor.nbytes for tensor in stack.tensors().values())
        # Pages of the experts' files are given back on the way, so that memory goes to the stacks.
        if read > READ_AT_ONCE:
            pool.release()
            read = 0
    pool.release()


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """The base model again, exactly as it was before `compose`, which changed it in place.

    Args:
        model: A routed model.

    Raises:
        RoutingError: `model` is not routed.
    """
    parts = composition_of(model)
    if parts.context is not None:
        parts.context.detach()
    for name, layer in parts.layers.items():
        replace_module(model, name, layer.base)
    del model.save_pretrained, model.tokenizer  # the model's own is its class's
    delattr(model, ROUTED)
    return model


# Opening a model from any place.


@dataclass(frozen=True)
class OpenedModel:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def is_routed(place: str | Path) -> bool:
    """True for a folder that `save` of a routed model wrote."""
    return os.path.isfile(os.path.join(place, ROUTED_INFO))


def is_pool(place: str | Path) -> bool:
    """True for an expert's directory, a folder of such, or a reference to the Hub."""
    if HubReference.is_one(place):
        return True
    is_model = os.path.isfile(os.path.join(place, CONFIG)) or is_routed(place)
    return os.path.isdir(place) and not is_model


def require_pool(place: str | Path) -> None:
    """Raise ConfigError unless `place` is a pool."""
    if not is_pool(place):
        there = Path(place).exists()
        gone = "" if there else f" No folder {place} is here.{closest_beside(place)}"
        raise ConfigError(
            f"{place} is not a pool: a routed model has its own router and experts, and a base "
            f"alone has none. Name the pool to choose them.{gone}"
        )


def selected(
    place: str | Path, keep: Iterable[str] | None, leave_out: Iterable[str] | None
) -> Pool | str | Path:
    """`place`, or the pool there with these experts alone; ConfigError where it is no pool."""
    if not (keep or leave_out):
        return place
    require_pool(place)
    return Pool.open(place).select(keep, leave_out)


def open_model(
    place: Pool | str | Path,
    base: Base | str | None = None,
    *,
    dtype: str = "auto",
    routing: Routing | None = None,
    scores: Scores | str | Path | None = None,
) -> OpenedModel:
    """The model at `place`: a routed one, a pool composed by `routing`, or a base model alone.

    `base`, a loaded one or a name, serves pools and routed models; None loads the one they name.
    `scores` are those of `compose`, for pools alone; of `routing` a routed model takes the
    embedder. Raises ConfigError when another place is given scores, and what loading or composing
    does.
    """
    if scores and not isinstance(place, Pool):
        require_pool(place)
    if not isinstance(place, Pool) and is_routed(place):
        embedder = routing.embedder if routing else None
        routed = load(place, base, dtype=dtype, embedder=embedder)
    elif isinstance(place, Pool) or is_pool(place):
        pool = Pool.open(place)
        loaded = resolve_base(base, pool.base, dtype)
        routed = compose(pool, loaded, routing=routing, scores=scores)
    else:
        alone = load_base(place, dtype=dtype)
        return OpenedModel(alone.model, alone.tokenizer)
    return OpenedModel(routed, routed.phatgoose.tokenizer)


def open_prompt_router(
    place: Pool | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    routing: Routing | None = None,
    **settings: Unpack[RoutingSettings],
) -> PromptRouter:
    """What chooses the experts of a pool or a saved model for a prompt; no base is loaded.

        chooser = open_prompt_router("experts/", router="retrieval")
        chooser.choose(["What is 12 + 7?"]).named(chooser.experts)

    `routing` and `settings` are those of `compose`; of a saved model's only the embedder counts.
    Prompts are as a `PromptRouter` takes them: text without a `tokenizer` for routers that go by
    embeddings alone; those that go by what the base makes of a prompt are handed `base` in
    `choose`. Raises ConfigError for a router that looks at no prompt,
    and what composing or loading raises of the experts.
    """
    routing = _routing(routing, settings, "open_prompt_router")
    if not isinstance(place, Pool) and is_routed(place):
        saved = read_saved(Path(place))
        router = _by_prompt(replace(saved.router.routing, embedder=routing.embedder))
        return PromptRouter(router, saved.tables, tokenizer)
    pool = Pool.open(place)
    router = _by_prompt(first_allowed(routing, pool, BY_PROMPT))
    check_routing(router, pool)
    return PromptRouter(router, router.tables(pool), tokenizer)


def _by_prompt(routing: Routing) -> ByPrompt:
    router = router_of(routing)
    if not isinstance(router, ByPrompt):
        raise ConfigError(
            f"Router {routing.router} doesn't choose by a prompt alone; use retrieval, centroid "
            f"or discriminant."
        )
    check_served(router)
    return router
