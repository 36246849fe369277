"""Adapters of every kind: which one a directory holds, and whether it fits a base.

LoRA, (IA)³    PEFT's files (`adapters`)
bottleneck     our own (`bottleneck`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.sites import Site
from ..errors import ExpertError
from ..files.tensor_file import TensorFile
from .kinds.bottleneck import (
    BOTTLENECK_CONFIG,
    BOTTLENECK_WEIGHTS,
    read_bottleneck,
    read_bottleneck_config,
)
from .kinds.modules import SiteModule
from .kinds.peft_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    read_adapter_config,
    read_ia3,
    read_lora,
    read_tensors,
    read_weights,
)

__all__ = ["AdapterFiles", "adapter_files", "check_fit", "named_base"]
__all__ += ["is_bottleneck", "read_adapter_weights", "read_modules"]


@dataclass(frozen=True)
class AdapterFiles:
    """The names of the two files that an adapter consists of."""

    config: str
    weights: str


PEFT_FILES = AdapterFiles(ADAPTER_CONFIG, ADAPTER_WEIGHTS)
BOTTLENECK_FILES = AdapterFiles(BOTTLENECK_CONFIG, BOTTLENECK_WEIGHTS)


def adapter_files(directory: Path) -> AdapterFiles:
    """The files of the adapter in `directory`: PEFT's, unless it has those of a bottleneck adapter.

    Raises ExpertError when there are files of both.
    """
    held = [
        files
        for files in (PEFT_FILES, BOTTLENECK_FILES)
        if any((directory / name).exists() for name in (files.config, files.weights))
    ]
    if len(held) > 1:
        raise ExpertError(
            f"{directory} holds files of two adapters, PEFT's and a bottleneck adapter; an expert "
            f"is one."
        )
    return held[0] if held else PEFT_FILES


def is_bottleneck(directory: Path) -> bool:
    """True when the adapter in `directory` is a bottleneck adapter. Raises as `adapter_files`."""
    return adapter_files(directory) is BOTTLENECK_FILES


def read_adapter_weights(directory: Path) -> TensorFile:
    """Every tensor of the adapter in `directory`, of whichever kind. Raises ExpertError."""
    if is_bottleneck(directory):
        return read_tensors(directory / BOTTLENECK_WEIGHTS)
    return read_weights(directory)


def read_modules(
    directory: Path, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, SiteModule]:
    """What the adapter in `directory`, of whichever kind, does at each site.

    `tensors` are its weights where they have been read already. Raises ExpertError when its files
    are missing or damaged or it is of no kind that can be routed.
    """
    if is_bottleneck(directory):
        return dict(read_bottleneck(directory, tensors))
    read = read_lora if read_adapter_config(directory)["peft_type"] == "LORA" else read_ia3
    return dict(read(directory, tensors))


def named_base(directory: Path) -> str | None:
    """The base that the adapter in `directory` names, None when it names none.

    Raises ExpertError when there is no adapter that could be routed.
    """
    if is_bottleneck(directory):
        named: Any = read_bottleneck_config(directory)["base"]
    else:
        named = read_adapter_config(directory).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def check_fit(
    name: str,
    modules: Mapping[str, SiteModule],
    sites: Mapping[str, Site],
    vectors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Raise ExpertError unless the modules of expert `name` fit the base, which has `sites`.

    `vectors` are its gates and means, if any, by what one of them is called: those of a module that
    doesn't see the site's input can be held against the base only.
    """
    for site, module in modules.items():
        if site not in sites:
            raise ExpertError(f"Expert {name!r} acts on {site}, which the base model lacks.")
        wanted = (sites[site].in_features, sites[site].out_features)
        got = (
            wanted[0] if module.in_features is None else module.in_features,
            wanted[1] if module.out_features is None else module.out_features,
        )
        if got != wanted:
            raise ExpertError(
                f"Expert {name!r}, site {site}: maps {got[0]} to {got[1]} features, the base model "
                f"{wanted[0]} to {wanted[1]}; it was trained on another base."
            )
        for kind, held in (vectors or {}).items():
            if site in held and tuple(held[site].shape) != (wanted[0],):
                raise ExpertError(
                    f"Expert {name!r}, site {site}: the {kind} has shape "
                    f"{tuple(held[site].shape)}, the base model wants {(wanted[0],)}."
                )
