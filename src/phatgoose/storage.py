"""Routed models in a folder: the stacked experts and their router, without the base's weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .adapters import read_tensors
from .bases import Base, BaseReference, load_base
from .config import Routing
from .errors import ExpertError, RoutingError
from .expert import sha256_of
from .pool import SiteStack
from .routed import (
    Composition,
    RoutedLinear,
    check_fingerprint,
    composition_of,
    install,
    resolve_base,
)
from .routers import ScoredRouter, make_router
from .sites import find_sites
from .work import new_directory

__all__ = ["ROUTED_INFO", "load", "save"]

FORMAT_VERSION = 1
ROUTED_INFO = "routed.json"
ROUTED_WEIGHTS = "routed.safetensors"


def save(model: PreTrainedModel, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write the routed `model` to `directory`: experts, router and hashes; the base by name only.

    Complete or not at all. Raises RoutingError when `model` is not routed, or `directory` exists
    (unless `overwrite`) or can't be written.
    """
    parts = composition_of(model)
    target = Path(directory)
    if target.exists() and not overwrite:
        raise RoutingError(f"{target} exists already; choose another place or allow overwriting.")
    with new_directory(target, RoutingError) as work:
        save_file(_tensors(parts), work / ROUTED_WEIGHTS)
        info = {
            "format_version": FORMAT_VERSION,
            "base": asdict(parts.base),
            "routing": asdict(parts.routing),
            "experts": parts.records,
            "weights_sha256": sha256_of(work / ROUTED_WEIGHTS),
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
    try:
        wanted, routing = BaseReference(**info["base"]), Routing(**info["routing"])
    except TypeError as error:
        raise RoutingError(f"{directory / ROUTED_INFO} has unknown settings: {error}.") from error
    if base is None:
        base = load_base(wanted.id, revision=wanted.revision, dtype=dtype)
    found = resolve_base(base, wanted)
    check_fingerprint(wanted, found.reference)
    sites = find_sites(found.model)
    layers = {}
    for name in [key.removeprefix("experts.") for key in tensors if key.startswith("experts.")]:
        original = found.model.get_submodule(name)
        stack, vectors = _stack_of(name, tensors, original.weight)
        router = make_router(vectors, len(stack.experts), routing).to(original.weight.device)
        layers[name] = RoutedLinear(original, sites[name], stack, router, routing.kernel)
    parts = Composition(
        base=found.reference,
        tokenizer=found.tokenizer,
        experts=tuple(record["name"] for record in info["experts"]),
        records=info["experts"],
        routing=routing,
        layers=layers,
    )
    return install(found.model, parts)


def _tensors(parts: Composition) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in parts.layers.items():
        tensors |= {f"A.{name}": layer.A, f"B.{name}": layer.B, f"experts.{name}": layer.experts}
        if isinstance(layer.router, ScoredRouter):
            tensors[f"vectors.{name}"] = layer.router.vectors
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        if sha256_of(path) != sha256:
            raise RoutingError(f"{path} was changed after it was written.")
        return read_tensors(path)
    except ExpertError as error:
        raise RoutingError(str(error)) from error


def _stack_of(
    name: str, tensors: dict[str, Tensor], weight: Tensor
) -> tuple[SiteStack, Tensor | None]:
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    A, B = (tensors[f"{side}.{name}"].to(weight.device, dtype) for side in "AB")
    experts = tensors[f"experts.{name}"].to(weight.device)
    return SiteStack(experts, A, B), tensors.get(f"vectors.{name}")


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
