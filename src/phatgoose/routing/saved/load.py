"""Routed models read from a folder (`saving` writes it), beside a base loaded by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...base.fingerprint import BaseReference, check_base
from ...base.loading import Base, load_base
from ...base.offloading import execution_device
from ...base.sites import Site, find_sites
from ...config import Routing
from ...errors import ConfigError, RoutingError, WrongBaseError
from ...tasks.embeddings import usable_embedder
from ..compose import dtype_at, install, resolve_base, routed_layer
from ..composition import Composition
from ..kernels.choice import check_kernel
from ..layers import FoldedLinear, RoutedLayer
from ..routers.per_input.lookup import Lookup, Retriever, TaskTable
from ..routers.per_input.phatgoose_input import GateVote
from ..routers.registry import MERGED, VOTED, check_choices, columns_of
from ..stacks.site_stack import TENSORS, SiteStack
from .description import ROUTED_INFO, base_in, read_info
from .save import save
from .tensors import EMBEDDINGS, OWNERS, VOTES, Packed, read_packed

__all__ = ["base_of", "check_router_of", "load", "save"]

SCORES = ("scores with no vectors", "scores with vectors")


def load(
    directory: str | Path,
    base: Base | PreTrainedModel | str | None = None,
    *,
    dtype: str = "auto",
    retrieval_embedder: str | None = None,
) -> PreTrainedModel:
    """The routed model that `save` wrote to `directory`; the experts' own files are not needed.

    `base` None loads the base by its recorded name, in `dtype`. `retrieval_embedder` is that of
    `compose`.
    Raises RoutingError when the folder is missing or damaged, WrongBaseError when the base is
    another one, ConfigError where router retrieval needs an embedder that wasn't named.
    """
    directory = Path(directory)
    packed = read_packed(directory)
    wanted, routing = packed.base, packed.routing
    check_router_of(packed)
    routing = replace(routing, retrieval_embedder=retrieval_embedder)
    if base is None:
        base = load_base(wanted.id, revision=wanted.revision, dtype=dtype)
    found = resolve_base(base, wanted)
    check_base(wanted, found.reference)
    sites = find_sites(found.model)
    tensors, layers = packed.tensors, {}
    for name in packed.sites:
        if name not in sites:
            raise WrongBaseError(f"Experts in {directory} act on {name}, which the base lacks.")
    lookup = _lookup(packed, routing, sites, found.tokenizer)
    for name in packed.sites:
        layers[name] = _layer(
            found.model, sites[name], tensors, routing, lookup, len(packed.records)
        )
    parts = Composition(
        base=found.reference,
        tokenizer=found.tokenizer,
        experts=packed.names,
        records=packed.records,
        routing=routing,
        layers=layers,
        lookup=lookup,
    )
    return install(found.model, parts)


def check_router_of(packed: Packed) -> None:
    """Raise unless the router of `packed` is known and has vectors wherever it scores, only there.

    ConfigError for one that isn't known, RoutingError for the rest.
    """
    routing = packed.routing
    check_choices(routing)
    check_kernel(routing.kernel)
    scores, tensors = columns_of(routing, 1) is not None, packed.tensors
    for site in packed.sites:
        if (f"vectors.{site}" in tensors) != scores:
            has = "none" if scores else "some"
            raise RoutingError(f"Router {routing.router} {SCORES[scores]}, but {site} has {has}.")


def base_of(directory: str | Path) -> BaseReference:
    """The base that the routed model in `directory` was made of.

    Raises RoutingError when the folder is missing or damaged.
    """
    return base_in(read_info(Path(directory) / ROUTED_INFO))


def _lookup(
    packed: Packed,
    routing: Routing,
    sites: Mapping[str, Site],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Lookup | None:
    held, tensors = packed.info.get("lookup", {}), packed.tensors
    wanted = {"oracle": "experts_by_task", "retrieval": "embedder"}.get(routing.router)
    if wanted is not None and wanted not in held:
        raise RoutingError(f"Router {routing.router} needs lookup.{wanted} in {ROUTED_INFO}.")
    if routing.router == "oracle":
        return TaskTable(held["experts_by_task"])
    if routing.router not in (VOTED, "retrieval"):
        return None
    if tokenizer is None:
        raise ConfigError(
            f"Router {routing.router} reads prompts; hand the base over with its tokenizer."
        )
    if routing.router == VOTED:
        votes = {site: _votes_at(site, tensors, sites[site].in_features) for site in packed.sites}
        return GateVote(votes, len(packed.records), routing.eps, tokenizer)
    if EMBEDDINGS not in tensors or not len(tensors[OWNERS]):
        raise RoutingError("Router retrieval has no embeddings to look inputs up in.")
    embedder = usable_embedder(held["embedder"], routing.retrieval_embedder)
    return Retriever(tensors[EMBEDDINGS], tensors[OWNERS], embedder, tokenizer)


def _votes_at(site: str, tensors: Mapping[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """What the experts at `site` vote with, and which they are."""
    votes, experts = tensors.get(f"{VOTES}{site}"), tensors[f"experts.{site}"]
    if votes is None or votes.shape != (len(experts), n + 1):
        got = "none" if votes is None else list(votes.shape)
        raise RoutingError(
            f"Router {VOTED} needs votes at {site} of shape {[len(experts), n + 1]}, got {got}."
        )
    return votes, experts


def _layer(
    model: PreTrainedModel,
    site: Site,
    tensors: Mapping[str, Tensor],
    routing: Routing,
    lookup: Lookup | None,
    pool_size: int,
) -> RoutedLayer:
    name = site.name
    original: Any = model.get_submodule(name)
    device = execution_device(original)
    experts = tensors[f"experts.{name}"].to(device)
    dtype = dtype_at(original, model)
    if f"folded.{name}" in tensors:
        folded = tensors[f"folded.{name}"].to(device, dtype)
        if routing.router != MERGED or folded.shape != (site.out_features, site.in_features):
            raise RoutingError(
                f"Experts at {name} are folded into a weight of shape {list(folded.shape)} for "
                f"router {routing.router}; wanted [{site.out_features}, {site.in_features}] for "
                f"router {MERGED}."
            )
        return FoldedLinear(original, site, folded, experts, pool_size)
    held = {key: tensors[f"{key}.{name}"] for key in TENSORS if f"{key}.{name}" in tensors}
    stack = SiteStack.of(held, experts).to(device, dtype)
    vectors = tensors.get(f"vectors.{name}")
    return routed_layer(original, site, stack, routing, vectors, lookup, pool_size, may_fold=False)
