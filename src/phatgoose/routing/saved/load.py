"""Loading routed models from their folders, beside a base loaded by its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...base.fingerprint import BaseReference, check_base
from ...base.loading import Base
from ...base.sites import Site, execution_device, find_sites
from ...errors import RoutingError, WrongBaseError
from ..checks import check_folded
from ..compose import dtype_at, install, resolve_base, routed_layer
from ..composition import Composition
from ..layers import FoldedLinear, RoutedLayer
from ..routers.prompt_router import ByPrompt
from ..routers.router import router_of
from .tensors import ROUTED_INFO, SavedModel, base_in, read_description, read_saved


def load(
    directory: str | Path,
    base: Base | PreTrainedModel | str | None = None,
    *,
    dtype: str = "auto",
    embedder: str | None = None,
) -> PreTrainedModel:
    """The routed model that `save` wrote to `directory`; the experts' own files are not needed.

    A `base` that is a name is loaded in `dtype`, and so is the recorded one that None means; a
    loaded base stays as it is. `embedder` is that of `compose`.
    Raises RoutingError when the folder is missing or damaged, WrongBaseError when the base is
    another one, ConfigError if the router needs an embedder that wasn't named.
    """
    directory = Path(directory)
    saved = read_saved(directory)
    wanted, routing = saved.base, replace(saved.routing, embedder=embedder)
    found = resolve_base(base, wanted, dtype)
    check_base(wanted, found.reference)
    sites = find_sites(found.model)
    for name in saved.sites:
        if name not in sites:
            raise WrongBaseError(f"Experts in {directory} act on {name}, which the base lacks.")
    router, prompt_router = router_of(routing), None
    if isinstance(router, ByPrompt):
        prompt_router = router.for_model(saved.tables, found.tokenizer)
    parts = Composition(
        base=found.reference,
        tokenizer=found.tokenizer,
        experts=saved.names,
        records=saved.records,
        routing=router.routing,
        prompt_router=prompt_router,
        marks=found.marks,
    )
    for name in saved.sites:
        parts.layers[name] = _layer(found.model, sites[name], saved, parts)
    return install(found.model, parts)


def base_of(directory: str | Path) -> BaseReference:
    """The base of the routed model in `directory`. Raises RoutingError when that is damaged."""
    return base_in(read_description(Path(directory) / ROUTED_INFO))


def _layer(
    model: PreTrainedModel, site: Site, saved: SavedModel, parts: Composition
) -> RoutedLayer:
    name, tensors, router = site.name, saved.tensors, parts.router
    original: Any = model.get_submodule(name)
    device, dtype = execution_device(original), dtype_at(original, model)
    experts = tensors[f"experts.{name}"].to(device)
    if f"folded.{name}" in tensors:
        folded = tensors[f"folded.{name}"].to(device, dtype)
        if not router.folds or folded.shape != (site.out_features, site.in_features):
            raise RoutingError(
                f"Experts at {name} are folded into a weight of shape {list(folded.shape)} for "
                f"router {parts.routing.name}; wanted [{site.out_features}, {site.in_features}] "
                f"for router merged."
            )
        check_folded(folded, name)
        return FoldedLinear(original, site, folded, experts, len(parts.experts))
    state = {kind: tensors[f"{kind}.{name}"] for kind in router.form}
    stack = saved.stack(name).to(device, dtype)
    return routed_layer(original, site, stack, state, parts, may_fold=False)
