"""Loading routed models from their folders, beside a base loaded by its name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...base import Base, BaseReference, check_base
from ...errors import RoutingError, WrongBaseError
from ...experts.expert import LAYOUT
from ...experts.hub import HubReference
from ...experts.peft_files import ADAPTER_CONFIG
from ...experts.pool import MANIFEST
from ...files import shortened
from ...sites import Site, dtype_at, execution_device, find_sites
from ..checks import check_folded
from ..compose import install, parts_of, resolve_base, routed_layer
from ..composition import Composition
from ..layers import FoldedLinear, RoutedLayer
from ..routers.prompt_router import ByPrompt
from ..routers.router import router_of
from .save import CONFIG, is_ours
from .tensors import ROUTED_INFO, SavedModel, base_in, read_description, read_saved


def load(
    directory: str | Path,
    base: Base | PreTrainedModel | str | None = None,
    *,
    dtype: str = "auto",
    embedder: str | None = None,
) -> PreTrainedModel:
    """The routed model that `save` wrote to `directory`; the experts' own files are not needed.

    Args:
        directory: The folder.
        base: A name, a loaded `Base` or a transformers model; None loads the base by its recorded
            name.
        dtype: "auto", "float32", "bfloat16" or "float16", for a base that is loaded here.
        embedder: The embedder of a router that uses one, if it isn't the default one.

    Raises:
        RoutingError: The folder is missing or damaged, or is something else, which the message
            names.
        WrongBaseError: The base is another one.
        ConfigError: The router needs an embedder that wasn't named.
    """
    directory = Path(directory)
    if not os.path.isfile(directory / ROUTED_INFO):
        raise RoutingError(f"{directory} holds no routed model: {_found_at(directory)}")
    saved = read_saved(directory)
    wanted, routing = saved.base, replace(saved.routing, embedder=embedder)
    found = resolve_base(base, wanted, dtype)
    check_base(wanted, found.reference)
    sites = find_sites(found.model)
    for name in saved.sites:
        if name not in sites:
            acting = (shortened(saved.names[z]) for z in saved.at(name).stack.experts.tolist())
            raise WrongBaseError(
                f"In {directory}, {', '.join(acting)} act on {name}, which the base lacks; take "
                f"them out (phatgoose remove)."
            )
    router = router_of(routing)
    tables = saved.tables if isinstance(router, ByPrompt) else None
    parts = parts_of(found, router, saved.names, saved.records, tables)
    for name in saved.sites:
        parts.layers[name] = _layer(found.model, sites[name], saved, parts)
    return install(found.model, parts)


def base_of(directory: str | Path) -> BaseReference:
    """The base of the routed model in `directory`. Raises RoutingError when that is damaged."""
    return base_in(read_description(Path(directory) / ROUTED_INFO))


def _found_at(place: Path) -> str:
    """What is at `place` in place of a routed model, and what to call, as a sentence."""
    named = str(place)
    if HubReference.is_one(named) or place.suffix == MANIFEST:
        return f"it names a pool. Route that with compose({named!r})."
    if not os.path.isdir(place):
        return "it is a file." if os.path.exists(place) else "there is no such folder."
    if (place / LAYOUT.info).is_file():
        return f"it is one expert. Route it with compose({named!r})."
    if (place / ADAPTER_CONFIG).is_file():
        return f"it is a PEFT adapter. Route it with compose({named!r})."
    if is_ours(place / CONFIG):
        return "saving one broke off before its end. Save it again."
    if (place / CONFIG).is_file():
        return "it is a plain model. Use transformers' from_pretrained, or compose(pool, base)."
    inside = sorted(each for each in place.iterdir() if each.is_dir())
    if any((each / LAYOUT.info).is_file() for each in inside):
        return f"it is a pool of experts. Route it with compose({named!r})."
    if any((each / ADAPTER_CONFIG).is_file() for each in inside):
        return f"it is a folder of PEFT adapters. Route them with compose({named!r})."
    return "it is an empty folder." if not any(place.iterdir()) else f"it has no {ROUTED_INFO}."


def _layer(
    model: PreTrainedModel, site: Site, saved: SavedModel, parts: Composition
) -> RoutedLayer:
    name, (stack, state) = site.name, saved.at(site.name)
    original: Any = model.get_submodule(name)
    device, dtype = execution_device(original), dtype_at(original, model)
    if f"folded.{name}" in saved.tensors:
        folded = saved.tensors[f"folded.{name}"].to(device, dtype)
        if not parts.router.folds or folded.shape != (site.out_features, site.in_features):
            raise RoutingError(
                f"Experts at {name} are folded into a weight of shape {list(folded.shape)} for "
                f"router {parts.routing.name}; wanted [{site.out_features}, {site.in_features}] "
                f"for router merged."
            )
        check_folded(folded, name)
        return FoldedLinear(original, site, folded, stack.experts.to(device), len(parts.experts))
    return routed_layer(original, site, stack.to(device, dtype), state, parts, may_fold=False)
