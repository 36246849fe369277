"""The routed model: a transformers model whose linear layers pick their experts for every token."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.fingerprint import BaseReference, check_base, fingerprint, quantisation
from ..base.loading import Base, load_base
from ..base.offloading import check_in_place, execution_device
from ..base.sites import ROUTED, Site, find_sites, replace_module
from ..config import Formatting, Routing
from ..errors import RoutingError
from ..experts.adapter import check_fit
from ..experts.pool import Pool
from ..files.prefetch import ahead
from ..tasks.task import Example
from .composition import Composition, composition_of
from .kernels.choice import check_kernel
from .kernels.mixed import mixed_factors
from .layers import (
    ChoosingLayer,
    FoldedLinear,
    RoutedLayer,
    RoutedLinear,
    folded_weight,
    is_cheaper_folded,
)
from .mixed_layer import MixedLinear
from .recording import Recording, Watcher, watching
from .routers.fixed.unscored import RandomRouter
from .routers.per_input.lookup import Lookup
from .routers.per_token.scored import ArrowRouter, ScoredRouter
from .routers.registry import (
    MERGED,
    check_routing,
    columns_of,
    make_lookup,
    make_router,
    narrow_pool,
    router_vectors,
    warn_of_untrained,
)
from .routers.scores import Scores, read_scores
from .saved.save import save_pretrained
from .soundness import check_stack
from .stacks.site_stack import SiteStack, stack_of

__all__ = [
    "Composition",
    "Preparation",
    "compose",
    "composition_of",
    "detach",
    "prepare",
    "record",
    "routed_layers",
    "serving",
    "watch",
]

READ_AT_ONCE = 2**26  # bytes of experts' files in memory, beside the stacks made of them


def compose(
    pool: Pool | str | Path,
    base: Base | PreTrainedModel | str | None = None,
    *,
    router: str = "phatgoose",
    k: int = 2,
    kernel: str = "auto",
    keep: Iterable[str] | None = None,
    leave_out: Iterable[str] | None = None,
    eps: float = 1e-5,
    expert: str | None = None,
    scores: Scores | str | Path | None = None,
    arrow: str = "svd",
    router_seed: int = 0,
    stand_in: bool = False,
    affinity: str = "standardised",
    router_temperature: float = 1.0,
    retrieval_embedder: str | None = None,
) -> PreTrainedModel:
    """The base model of `pool` with routed linears: still a PreTrainedModel, changed in place.

    `base` is a name, a loaded `Base` or a transformers model; None loads the one the pool was
    trained on. `router` is one of `routers.registry.ROUTERS`; `k` experts act per token, lowered
    with a warning when the pool has fewer. `keep` and `leave_out` select experts by name. `kernel`
    is "auto" or a name in `kernels.choice.KERNELS`. For router single, `expert` names it; for
    oracle and best-individual, `scores` are those of the single experts (expert -> task -> score,
    or the comparison.json of a comparison); for arrow, `arrow` is its form
    (`per_token.arrow`); for random, `router_seed` its seed. With `stand_in`,
    experts without gates join routers phatgoose and uniform-top-k, with a warning that names them
    (`per_token.stand_in`). `affinity` is how routers phatgoose and average-activation hold
    vectors against activations (`per_token.affinities`); `router_temperature` divides the
    affinities of scored routers before their softmax. For retrieval, `retrieval_embedder` names
    the sentence embedder where the experts record another than the default one
    (`embeddings.usable_embedder`). Undo with `detach`.

    Raises WrongBaseError when the base is not the experts' own, ExpertError when one doesn't fit
    it, PoolError for unknown experts or missing vectors, embeddings or scores, ConfigError for an
    unknown router or kernel, RoutingError when the base is routed already.
    """
    routing = Routing(
        *(router, k, kernel, eps, expert, arrow, router_seed, stand_in),
        *(affinity, router_temperature, retrieval_embedder),
    )
    prepared = prepare(pool, base, routing, scores=scores, keep=keep, leave_out=leave_out)
    pool, found = prepared.pool, prepared.base
    layers = {layer.site.name: layer for layer in routed_layers(prepared)}
    parts = Composition(
        base=found.reference,
        tokenizer=found.tokenizer,
        experts=pool.names,
        records=pool.records(),
        routing=routing,
        layers=layers,
        lookup=prepared.lookup,
    )
    return install(found.model, parts)


@dataclass(frozen=True)
class Preparation:
    """What routed layers are made of: a pool that fits its base, and what its router needs."""

    pool: Pool
    base: ResolvedBase
    routing: Routing
    sites: Mapping[str, Site]
    lookup: Lookup | None


def prepare(
    pool: Pool | str | Path,
    base: Base | PreTrainedModel | str | None,
    routing: Routing,
    *,
    scores: Scores | str | Path | None = None,
    keep: Iterable[str] | None = None,
    leave_out: Iterable[str] | None = None,
) -> Preparation:
    """`pool` and `base`, opened and held against each other: the first half of `compose`."""
    pool = pool if isinstance(pool, Pool) else Pool.open(pool)
    pool = pool.select(keep, leave_out)
    check_routing(routing, pool)
    check_kernel(routing.kernel)
    scores = read_scores(scores) if isinstance(scores, str | Path) else scores
    pool = narrow_pool(pool, routing, scores)
    found = resolve_base(base, pool.base)
    check_base(pool.base, found.reference)
    lookup = make_lookup(pool, routing, scores, found.tokenizer)
    sites = find_sites(found.model)
    for each in pool.experts:
        check_fit(each.name, each.modules, sites, {"gate": each.gates, "mean": each.means})
    return Preparation(pool, found, routing, sites, lookup)


def routed_layers(prepared: Preparation) -> Iterator[RoutedLayer]:
    """The layers that take the places of the base's, site by site.

    What is read of the experts' files is given back on the way, so that stacks are what memory
    goes to.
    """
    pool, model, routing = prepared.pool, prepared.base.model, prepared.routing
    flat, read = {}, 0
    stacks = ahead(lambda name: stack_at(model, name, pool), pool.sites)
    rows = ahead(lambda name: router_vectors(pool, name, routing), pool.sites)
    for name, stack, vectors in zip(pool.sites, stacks, rows, strict=True):
        if vectors is not None:
            flat[name] = ~vectors.any(dim=-1)
        original, site = model.get_submodule(name), prepared.sites[name]
        yield routed_layer(original, site, stack, routing, vectors, prepared.lookup, len(pool))
        read += sum(tensor.nbytes for tensor in stack.tensors().values())
        if read > READ_AT_ONCE:
            pool.release()
            read = 0
    pool.release()
    warn_of_untrained(pool, routing.router, flat)


def stack_at(model: PreTrainedModel, site: str, pool: Pool) -> SiteStack:
    """The modules of the experts of `pool` at a `site` of `model`, in the type and place of it."""
    layer = model.get_submodule(site)
    return stack_of(pool, site, dtype_at(layer, model), execution_device(layer))


def dtype_at(layer: Any, model: PreTrainedModel) -> torch.dtype:
    """The type that experts have at `layer` of `model`: its own, or the model's if quantised."""
    weight: Tensor = layer.weight
    return weight.dtype if weight.is_floating_point() else model.dtype


def routed_layer(
    original: Any,
    site: Site,
    stack: SiteStack,
    routing: Routing,
    vectors: Tensor | None,
    lookup: Lookup | None,
    pool_size: int,
    *,
    may_fold: bool = True,
) -> RoutedLayer:
    """The layer that takes the place of `original` at `site`, ready to be installed."""
    plain = stack.plain_lora
    if plain and may_fold and routing.router == MERGED and is_cheaper_folded(original, plain):
        folded = folded_weight(original, plain, pool_size)
        return FoldedLinear(original, site, folded, stack.experts, pool_size)
    check_stack(
        stack,
        site.name,
        (site.in_features, site.out_features),
        pool_size,
        vectors,
        columns_of(routing, site.in_features),
    )
    router = make_router(site.name, stack.experts, pool_size, routing, vectors, lookup)
    router.to(execution_device(original), stack.dtype)
    product = mixed_factors if routing.router == "arrow" and routing.arrow == "mttl" else None
    if plain is None:
        return MixedLinear(original, site, stack, router, routing.kernel, product)
    one_call = type(router) in (ScoredRouter, ArrowRouter)
    return RoutedLinear(original, site, stack, router, routing.kernel, product, one_call=one_call)


def install(model: PreTrainedModel, parts: Composition) -> PreTrainedModel:
    """Put the routed layers of `parts` into `model` and return it."""
    for name, layer in parts.layers.items():
        replace_module(model, name, layer)
    if parts.lookup is not None:
        parts.lookup.attach(model)
    setattr(model, ROUTED, parts)
    model.save_pretrained = partial(save_pretrained, model)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """The base model again, exactly as it was before `compose`, which changed it in place.

    Raises RoutingError when `model` is not routed, or was offloaded after it was composed.
    """
    parts = composition_of(model)
    check_in_place(parts.layers.values())
    if parts.lookup is not None:
        parts.lookup.detach()
    for name, layer in parts.layers.items():
        replace_module(model, name, layer.base)
    del model.save_pretrained  # the model's own is its class's
    delattr(model, ROUTED)
    return model


@contextmanager
def record(model: PreTrainedModel) -> Iterator[Recording]:
    """A `Recording` that fills with every routing decision of `model` while the context is open.

    Only calls of this thread are recorded. Raises RoutingError when `model` is not routed.
    """
    recording = Recording(composition_of(model).experts)
    with watch(model, recording.add):
        yield recording


@contextmanager
def watch(model: PreTrainedModel, watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` every routing decision of `model` in this thread while the context is open.

    A compiled model runs uncompiled meanwhile. Raises RoutingError when `model` is not routed.
    """
    with watching(model, composition_of(model).layers, watcher):
        yield


@contextmanager
def serving(
    model: PreTrainedModel,
    task: str,
    examples: Sequence[Example],
    formatting: Formatting | None = None,
) -> Iterator[Callable[[Sequence[int]], None]]:
    """A function to call before each pass through `model` with the rows' indices in `examples`.

    It is what routers need that go by whole inputs (retrieval; phatgoose-input, which reads them as
    `formatting` has it) or tasks (oracle, by the name `task`), and makes random ones start anew.
    Does nothing to other models, routed or not. Raises RoutingError when router oracle has no score
    of `task`.
    """
    parts = getattr(model, ROUTED, None)
    lookup = parts.lookup if parts is not None else None
    for layer in parts.layers.values() if parts is not None else ():
        if isinstance(layer, ChoosingLayer) and isinstance(layer.router, RandomRouter):
            layer.router.restart()
    if lookup is None:
        yield lambda _: None
        return
    lookup.begin_task(task)
    experts = lookup.find(examples, formatting)
    try:
        yield lambda rows: lookup.serve(experts[list(rows)])
    finally:
        lookup.serve(None)


@dataclass(frozen=True)
class ResolvedBase:
    """A base model to route in, not routed yet; `tokenizer` None means that none came with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    reference: BaseReference


def resolve_base(
    base: Base | PreTrainedModel | str | Path | None, wanted: BaseReference
) -> ResolvedBase:
    """The base given as a name, a `Base` or a model, loaded if need be; None means `wanted`.

    A quantised base can't be recognised by its weights; it is taken for `wanted`, with a warning.
    Raises RoutingError when the model is routed already.
    """
    if base is None:
        base = load_base(wanted.id, revision=wanted.revision)
    elif isinstance(base, str | Path):
        base = load_base(base)
    model = base.model if isinstance(base, Base) else base
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
