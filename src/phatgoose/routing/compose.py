"""Composing: a base model and a pool become one transformers model that routes every token."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base import (
    Base,
    BaseReference,
    check_base,
    check_heeds_masks,
    fingerprint,
    load_base,
    quantisation,
)
from ..config import Routing, RoutingSettings, from_mapping
from ..errors import BaseModelError, ConfigError, RoutingError
from ..experts.kind import check_fit
from ..experts.pool import Pool
from ..files import prefetch, shortened
from ..sites import (
    ROUTED,
    Site,
    check_in_place,
    dtype_at,
    execution_device,
    find_sites,
    replace_module,
)
from .checks import check_folded, check_numbers, check_site
from .composition import Composition, composition_of
from .layers import FoldedLinear, RoutedLayer, RoutedLinear, folded_weight, is_cheaper_folded
from .routers.automatic import settled
from .routers.prompt_router import ByPrompt, Tables
from .routers.registry import AUTO, WEIGHTS, checked_mixture, written_mixture
from .routers.router import (
    OWN_EXPERTS,
    Router,
    RouterSite,
    Scores,
    check_routing,
    read_scores,
    router_of,
    warn_of_constant_vectors,
)
from .saved.save import save_pretrained
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
        given = _with_mixture(weights, given)
    if given:
        routing = from_mapping(Routing, {**vars(routing), **given}, "compose", ARGUMENTS)
    return composed(pool, base, routing, scores=scores, keep=keep, leave_out=leave_out)


def _with_mixture(weights: Mapping[str, float], settings: Mapping[str, Any]) -> dict[str, Any]:
    router = settings.get("router", WEIGHTS)
    if router != WEIGHTS:
        raise ConfigError(f"weights are for router {WEIGHTS}, not {shortened(router)}.")
    mixture = written_mixture(checked_mixture(weights))
    return {**settings, "router": f"{WEIGHTS}:{mixture}" if mixture else WEIGHTS}


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
    parts = parts_of(found, router, pool.names, pool.records(), tables)
    sites = find_sites(model)
    check_pool_fits(pool, sites)
    check_acting(pool, is_encoder_decoder=bool(model.config.is_encoder_decoder))
    # Before any layer is replaced: it is the base alone that is read.
    parts.router.read_base(model, found.tokenizer, pool)
    _add_layers(parts, pool, model, sites, may_fold=may_fold)
    return install(model, parts)


def parts_of(
    base: ResolvedBase,
    router: Router,
    experts: tuple[str, ...],
    records: list[dict[str, Any]],
    tables: Tables | None,
) -> Composition:
    """What a model routed on `base` is made of but its layers; `tables` for a router by prompt."""
    prompt_router = None
    if isinstance(router, ByPrompt) and tables is not None:
        prompt_router = router.for_model(tables, base.tokenizer)
    return Composition(
        base=base.reference,
        tokenizer=base.tokenizer,
        experts=experts,
        records=records,
        routing=router.routing,
        prompt_router=prompt_router,
    )


def check_pool_fits(pool: Pool, sites: Mapping[str, Site]) -> None:
    """Raise ExpertError for an expert that doesn't fit the base's `sites`."""
    for each in pool.experts:
        check_fit(each.name, each.modules, sites, {"gate": each.gates, "mean": each.means})


def check_acting(pool: Pool, *, is_encoder_decoder: bool) -> None:
    """Raise RoutingError for experts that act from a prompt's end on in an encoder-decoder."""
    names = [repr(expert.name) for expert in pool.experts if expert.acts_on is not None]
    if names and is_encoder_decoder:
        raise RoutingError(
            f"{', '.join(names)} act from a prompt's end on, but in an encoder-decoder prompts "
            f"have a stack of their own; leave them out, or use a decoder-only base."
        )


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
    stacks = prefetch(lambda name: stack_at(model, name, pool), pool.sites)
    states = prefetch(lambda name: router.state_at(pool, name), pool.sites)
    for name, stack, state in zip(pool.sites, stacks, states, strict=True):
        if "vectors" in state:
            constant[name] = ~state["vectors"].any(dim=-1)
        original = model.get_submodule(name)
        parts.layers[name] = routed_layer(
            original, sites[name], stack, state, parts, may_fold=may_fold
        )
        read += sum(tensor.nbytes for tensor in stack.tensors().values())
        # Pages of the experts' files are given back on the way, so that memory goes to the stacks.
        if read > READ_AT_ONCE:
            pool.release()
            read = 0
    pool.release()
    warn_of_constant_vectors(pool, router, constant)


def stack_at(model: PreTrainedModel, site: str, pool: Pool) -> SiteStack:
    """The stack of all experts at `site`, in the type and on the device of the layer there."""
    layer = model.get_submodule(site)
    return stack_of(pool, site, dtype_at(layer, model), execution_device(layer))


def routed_layer(
    original: Any,
    site: Site,
    stack: SiteStack,
    state: Mapping[str, Tensor],
    parts: Composition,
    *,
    may_fold: bool = True,
) -> RoutedLayer:
    """The layer that takes the place of `original` at `site` in a model of these `parts`.

    `state` are the router's tensors there; `may_fold` folds the mean of all experts into the weight
    where that is cheaper. Raises as `checks` does.
    """
    router, plain, size = parts.router, stack.plain_lora, len(parts.experts)
    columns = activity_columns(parts, site, stack.experts)
    may_fold = may_fold and not any(columns)
    if plain and may_fold and router.folds and is_cheaper_folded(original, plain):
        check_numbers(stack, site.name, parts.experts)
        folded = folded_weight(original, plain, size)
        check_folded(folded, site.name)
        return FoldedLinear(original, site, folded, stack.experts, size)
    check_site(stack, site, size, state, router.form)
    check_numbers(stack, site.name, parts.experts)
    module = router.at(RouterSite(site.name, stack.experts, size, state, parts.context))
    weight = original.weight
    # Of a quantised layer the type is of integers.
    kind = weight.dtype if weight.is_floating_point() else stack.dtype
    module.to(execution_device(original), kind)
    return RoutedLinear(
        original,
        site,
        stack,
        module,
        parts.routing.kernel,
        parts.context,
        columns,
    )


def activity_columns(parts: Composition, site: Site, experts: Tensor) -> list[int]:
    """The columns of the `experts` [E] at `site` in an Activity of the context: 0 acts always.

    Raises RoutingError where an expert that acts from a prompt's end on can't.
    """
    known = parts.context.acting if parts.context else ()
    if not known:
        return []
    acting = parts.acting
    found = [acting[z] for z in experts.tolist()]
    if any(found) and OWN_EXPERTS in site.name.split("."):
        name = next(parts.experts[z] for z in experts.tolist() if acting[z])
        raise RoutingError(
            f"Expert {name!r} acts from a prompt's end on, but {site.name} is inside one of the "
            f"base's own experts, which see some tokens only; leave it out."
        )
    return [known.index(each) + 1 if each else 0 for each in found]


def install(model: PreTrainedModel, parts: Composition) -> PreTrainedModel:
    """Put the routed layers of `parts` into `model` and return it."""
    for name, layer in parts.layers.items():
        replace_module(model, name, layer)
    if parts.context is not None:
        parts.context.attach(model)
    setattr(model, ROUTED, parts)
    model.tokenizer = parts.tokenizer
    model.save_pretrained = partial(save_pretrained, model)
    return model


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


@dataclass(frozen=True)
class ResolvedBase:
    """A base model to route in, not routed yet; `tokenizer` None means that none came with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    reference: BaseReference


def resolve_base(
    base: Base | PreTrainedModel | str | Path | None, wanted: BaseReference, dtype: str = "auto"
) -> ResolvedBase:
    """The base given as a name, loaded in `dtype`, as a `Base` or a model; None means `wanted`.

    Raises RoutingError when the model is routed already, BaseModelError when it reads padding.
    """
    if base is None:
        base = load_base(wanted.id, revision=wanted.revision, dtype=dtype)
    elif isinstance(base, str | Path):
        base = load_base(base, dtype=dtype)
    model = base.model if isinstance(base, Base) else base
    if not isinstance(model, PreTrainedModel):
        raise BaseModelError(
            f"base is a {type(model).__name__}; wanted a name, a folder, a Base or a transformers "
            f"model."
        )
    check_heeds_masks(model.config)
    if hasattr(model, ROUTED):
        raise RoutingError("This base model is routed already; detach it first.")
    if isinstance(base, Base):
        tokenizer, reference = base.tokenizer, base.reference
    else:
        found = BaseReference(wanted.id, wanted.revision, fingerprint(model))
        tokenizer, reference = None, found
    kinds = quantisation(model)
    if kinds and wanted.fingerprint and reference.fingerprint != wanted.fingerprint:
        warnings.warn(
            f"The base model {reference.id!r} is quantised ({kinds}), so its weights can't be held "
            f"against the experts' fingerprint; taking it on trust.",
            stacklevel=3,
        )
        reference = replace(reference, fingerprint=wanted.fingerprint)
    return ResolvedBase(model, tokenizer, reference)
