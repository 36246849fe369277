"""Routed models in a folder: the stacked experts and their router, without the base's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import read_tensors
from .bases import Base, BaseReference, load_base
from .config import Routing
from .errors import ConfigError, ExpertError, RoutingError
from .files import sha256_of
from .layers import FoldedLinear, RoutedLayer, RoutedLinear
from .mapped import TensorFile
from .pool import SiteStack
from .routed import (
    Composition,
    check_fingerprint,
    composition_of,
    install,
    resolve_base,
    routed_layer,
)
from .routers import Lookup, Retriever, TaskTable, VectorRouter
from .sites import Site, find_sites
from .work import new_directory

__all__ = ["ROUTED_INFO", "ROUTED_WEIGHTS", "base_of", "load", "save"]

FORMAT_VERSION = 1
ROUTED_INFO = "routed.json"
ROUTED_WEIGHTS = "routed.safetensors"
EMBEDDINGS, OWNERS = "lookup.embeddings", "lookup.owners"


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
            "routing": asdict(parts.routing),
            "experts": parts.records,
            "weights_sha256": sha256_of(work / ROUTED_WEIGHTS),
            "lookup": _lookup_info(parts.lookup),
        }
        (work / ROUTED_INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def load(
    directory: str | Path,
    base: Base | PreTrainedModel | str | None = None,
    *,
    dtype: str = "auto",
) -> PreTrainedModel:
    """The routed model that `save` wrote to `directory`; the experts' own files are not needed.

    `base` None loads the base by its recorded name, in `dtype`. Raises RoutingError when the folder
    is missing or damaged, WrongBaseError when the base is another one.
    """
    directory = Path(directory)
    info = _read_info(directory / ROUTED_INFO)
    tensors = _read_weights(directory / ROUTED_WEIGHTS, info["weights_sha256"])
    wanted = base_of(directory)
    try:
        routing = Routing(**info["routing"])
    except TypeError as error:
        raise RoutingError(f"{directory / ROUTED_INFO} has unknown settings: {error}.") from error
    if base is None:
        base = load_base(wanted.id, revision=wanted.revision, dtype=dtype)
    found = resolve_base(base, wanted)
    check_fingerprint(wanted, found.reference)
    sites = find_sites(found.model)
    layers = {}
    lookup = _lookup(info, tensors, found.tokenizer)
    for name in [key.removeprefix("experts.") for key in tensors if key.startswith("experts.")]:
        layers[name] = _layer(found.model, sites[name], tensors, routing, lookup, info)
    parts = Composition(
        base=found.reference,
        tokenizer=found.tokenizer,
        experts=tuple(record["name"] for record in info["experts"]),
        records=info["experts"],
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
        return BaseReference(**_read_info(path)["base"])
    except TypeError as error:
        raise RoutingError(f"{path} has unknown settings: {error}.") from error


def _tensors(parts: Composition) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in parts.layers.items():
        tensors[f"experts.{name}"] = layer.experts
        if isinstance(layer, FoldedLinear):
            tensors[f"folded.{name}"] = layer.folded
        if isinstance(layer, RoutedLinear):
            tensors |= {f"A.{name}": layer.A, f"B.{name}": layer.B}
            if isinstance(layer.router, VectorRouter):
                tensors[f"vectors.{name}"] = layer.router.vectors
    if isinstance(parts.lookup, Retriever):
        tensors |= {EMBEDDINGS: parts.lookup.embeddings, OWNERS: parts.lookup.owners}
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _lookup_info(lookup: Lookup | None) -> dict[str, Any]:
    """What a looked-up router keeps beside its tensors."""
    if isinstance(lookup, Retriever):
        return {"embedder": lookup.embedder}
    return {"experts_by_task": lookup.experts} if isinstance(lookup, TaskTable) else {}


def _lookup(
    info: dict[str, Any], tensors: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase | None
) -> Lookup | None:
    held = info.get("lookup", {})
    if "experts_by_task" in held:
        return TaskTable(held["experts_by_task"])
    if "embedder" not in held:
        return None
    if tokenizer is None:
        raise ConfigError("Router retrieval reads prompts; hand the base over with its tokenizer.")
    return Retriever(tensors[EMBEDDINGS], tensors[OWNERS], held["embedder"], tokenizer)


def _layer(
    model: PreTrainedModel,
    site: Site,
    tensors: Mapping[str, Tensor],
    routing: Routing,
    lookup: Lookup | None,
    info: dict[str, Any],
) -> RoutedLayer:
    name = site.name
    original: Any = model.get_submodule(name)
    weight = original.weight
    experts = tensors[f"experts.{name}"].to(weight.device)
    dtype = weight.dtype if weight.is_floating_point() else model.dtype
    if f"folded.{name}" in tensors:
        folded = tensors[f"folded.{name}"].to(weight.device, dtype)
        return FoldedLinear(original, site, folded, experts, len(info["experts"]))
    A, B = (tensors[f"{side}.{name}"].to(weight.device, dtype) for side in "AB")
    vectors = tensors.get(f"vectors.{name}")
    stack = SiteStack(experts, A, B)
    return routed_layer(
        original, site, stack, routing, vectors, lookup, len(info["experts"]), may_fold=False
    )


def _read_weights(path: Path, sha256: str) -> TensorFile:
    try:
        tensors = read_tensors(path)
        if tensors.sha256() != sha256:
            raise RoutingError(f"{path} was changed after it was written.")
        return tensors
    except ExpertError as error:
        raise RoutingError(str(error)) from error


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = info["format_version"]
        missing = {"base", "routing", "experts", "weights_sha256"} - info.keys()
    except OSError as error:
        raise RoutingError(
            f"{path.parent} holds no routed model: {path.name} can't be read."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise RoutingError(
            f"{path} is not a valid description of a routed model: {error}."
        ) from error
    if missing:
        raise RoutingError(f"{path} lacks {', '.join(sorted(missing))}.")
    if version != FORMAT_VERSION:
        raise RoutingError(
            f"{path}: format version {version!r} is unknown, wanted {FORMAT_VERSION}."
        )
    return info
