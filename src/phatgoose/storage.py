"""Routed models in a folder: the stacked experts and their router, without the base's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .bases import Base, BaseReference, load_base
from .config import Routing
from .embeddings import usable_embedder
from .errors import ConfigError, RoutingError, WrongBaseError
from .files import sha256_of
from .layers import ChoosingLayer, FoldedLinear, RoutedLayer
from .packed import (
    EMBEDDINGS,
    OWNERS,
    ROUTED_INFO,
    ROUTED_WEIGHTS,
    VOTES,
    read_info,
    read_packed,
    routing_record,
)
from .routed import (
    Composition,
    check_fingerprint,
    composition_of,
    dtype_at,
    install,
    resolve_base,
    routed_layer,
)
from .routers import VOTED, GateVote, Lookup, Retriever, TaskTable, VectorRouter
from .sites import Site, find_sites
from .stacks import TENSORS, SiteStack
from .work import new_directory

__all__ = ["base_of", "layer_tensors", "load", "lookup_info", "lookup_tensors", "save"]

FORMAT_VERSION = 1


def save(model: PreTrainedModel, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write the routed `model` to `directory`: experts, router and hashes; the base by name only.

    Complete or not at all. Raises RoutingError when `model` is not routed, or `directory` exists
    (unless `overwrite`) or can't be written.
    """
    parts = composition_of(model)
    target = Path(directory)
    if target.exists() and not overwrite:
        raise RoutingError(f"{target} exists already; choose another place or allow overwriting.")
    with new_directory(target, RoutingError, overwrite=overwrite) as work:
        save_file(_tensors(parts), work / ROUTED_WEIGHTS)
        info = {
            "format_version": FORMAT_VERSION,
            "base": asdict(parts.base),
            "routing": routing_record(parts.routing),
            "experts": parts.records,
            "weights_sha256": sha256_of(work / ROUTED_WEIGHTS),
            "lookup": lookup_info(parts.lookup),
        }
        (work / ROUTED_INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


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
    wanted = base_of(directory)
    try:
        routing = Routing(**packed.info["routing"])
    except TypeError as error:
        raise RoutingError(f"{directory / ROUTED_INFO} has unknown settings: {error}.") from error
    routing = replace(routing, retrieval_embedder=retrieval_embedder)  # the file has no say
    if base is None:
        base = load_base(wanted.id, revision=wanted.revision, dtype=dtype)
    found = resolve_base(base, wanted)
    check_fingerprint(wanted, found.reference)
    sites = find_sites(found.model)
    tensors, layers = packed.tensors, {}
    lookup = _lookup(packed.info, tensors, found.tokenizer, retrieval_embedder)
    for name in packed.sites:
        if name not in sites:
            raise WrongBaseError(f"Experts in {directory} act on {name}, which the base lacks.")
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


def base_of(directory: str | Path) -> BaseReference:
    """The base that the routed model in `directory` was made of.

    Raises RoutingError when the folder is missing or damaged.
    """
    path = Path(directory) / ROUTED_INFO
    try:
        return BaseReference(**read_info(path)["base"])
    except TypeError as error:
        raise RoutingError(f"{path} has unknown settings: {error}.") from error


def _tensors(parts: Composition) -> dict[str, Tensor]:
    tensors = {f"experts.{name}": layer.experts for name, layer in parts.layers.items()}
    tensors |= lookup_tensors(parts.lookup)
    for layer in parts.layers.values():
        tensors |= layer_tensors(layer)
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def layer_tensors(layer: RoutedLayer) -> dict[str, Tensor]:
    """What is kept of a layer beside the indices of its experts, by name."""
    name, tensors = layer.site.name, {}
    if isinstance(layer, FoldedLinear):
        tensors[f"folded.{name}"] = layer.folded
    if isinstance(layer, ChoosingLayer):
        tensors |= {f"{kind}.{name}": tensor for kind, tensor in layer.stack.tensors().items()}
        if isinstance(layer.router, VectorRouter):
            tensors[f"vectors.{name}"] = layer.router.vectors
    return tensors


def lookup_tensors(lookup: Lookup | None) -> dict[str, Tensor]:
    """The tensors that a looked-up router keeps, by name."""
    if isinstance(lookup, GateVote):
        return {f"{VOTES}{site}": rows for site, (rows, _) in lookup.votes.items()}
    if not isinstance(lookup, Retriever):
        return {}
    return {EMBEDDINGS: lookup.embeddings, OWNERS: lookup.owners}


def lookup_info(lookup: Lookup | None) -> dict[str, Any]:
    """What a looked-up router keeps beside its tensors."""
    if isinstance(lookup, Retriever):
        return {"embedder": lookup.embedder}
    return {"experts_by_task": lookup.experts} if isinstance(lookup, TaskTable) else {}


def _lookup(
    info: dict[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    embedder: str | None,
) -> Lookup | None:
    held = info.get("lookup", {})
    if "experts_by_task" in held:
        return TaskTable(held["experts_by_task"])
    router = info["routing"]["router"]
    if router != VOTED and "embedder" not in held:
        return None
    if tokenizer is None:
        raise ConfigError(f"Router {router} reads prompts; hand the base over with its tokenizer.")
    if router == VOTED:
        sites = [name.removeprefix(VOTES) for name in tensors if name.startswith(VOTES)]
        votes = {site: (tensors[f"{VOTES}{site}"], tensors[f"experts.{site}"]) for site in sites}
        return GateVote(votes, len(info["experts"]), info["routing"]["eps"], tokenizer)
    embedder = usable_embedder(held["embedder"], embedder)
    return Retriever(tensors[EMBEDDINGS], tensors[OWNERS], embedder, tokenizer)


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
    weight = original.weight
    experts = tensors[f"experts.{name}"].to(weight.device)
    dtype = dtype_at(original, model)
    if f"folded.{name}" in tensors:
        folded = tensors[f"folded.{name}"].to(weight.device, dtype)
        return FoldedLinear(original, site, folded, experts, pool_size)
    held = {key: tensors[f"{key}.{name}"] for key in TENSORS if f"{key}.{name}" in tensors}
    stack = SiteStack.of(held, experts).to(weight.device, dtype)
    vectors = tensors.get(f"vectors.{name}")
    return routed_layer(original, site, stack, routing, vectors, lookup, pool_size, may_fold=False)
