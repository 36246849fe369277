"""Adapters: which kind a directory holds, what it does at each site, and whether it fits a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ExpertError
from ..passes import ActsOn, where_active
from ..sites import Site, WrappedLinear, find_sites, linear_shape, replaced
from .kinds.kind import AdapterFiles, SiteModule
from .kinds.peft import INVOCATION, PEFT_FILES
from .kinds.registry import Kind, loaded_kinds


def formats() -> tuple[AdapterFiles, ...]:
    return tuple(dict.fromkeys(kind.site_module.files for kind in loaded_kinds()))


def adapter_file_names() -> tuple[str, ...]:
    return tuple(name for files in formats() for name in (files.config, files.weights))


def kind_of(files: AdapterFiles, config: Mapping[str, Any]) -> Kind:
    """The kind whose adapters have these files; of PEFT's the one that the config names."""
    peft_type = config.get("peft_type") if files is PEFT_FILES else None
    return next(
        kind
        for kind in loaded_kinds()
        if kind.site_module.files is files and kind.peft_type == peft_type
    )


def adapter_files(directory: Path) -> AdapterFiles:
    """The files of the adapter in `directory`, by default PEFT's; ExpertError for several kinds."""
    held = [
        files
        for files in formats()
        if any((directory / name).exists() for name in (files.config, files.weights))
    ]
    beside = {name for files in held for name in files.beside}
    held = [files for files in held if files.config not in beside]
    if len(held) > 1:
        raise ExpertError(
            f"{directory} holds files of two adapters, as {held[0].config} and {held[1].config} "
            f"describe them; an expert has one."
        )
    return held[0] if held else PEFT_FILES


def read_modules(
    directory: Path, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, SiteModule]:
    """What the adapter in `directory` does, by site.

    `tensors` are its weights where they have been read already. Raises ExpertError when its files
    are missing or damaged or it is of no kind that can be routed.
    """
    files = adapter_files(directory)
    config = files.read_config(directory)
    tensors = files.read_weights(directory) if tensors is None else tensors
    return dict(kind_of(files, config).site_module.read(directory, config, tensors))


def named_base(directory: Path) -> str | None:
    """The base that the adapter names, None without. Raises ExpertError without an adapter."""
    files = adapter_files(directory)
    named = files.read_config(directory).get(files.base_key)
    return named if isinstance(named, str) and named else None


def invocation_of(directory: Path) -> ActsOn | None:
    """What an adapter of PEFT's aLoRA acts on; None for others, which act on all tokens."""
    files = adapter_files(directory)
    if files is not PEFT_FILES:
        return None
    tokens = files.read_config(directory).get(INVOCATION)
    return ActsOn.of({"invocation_tokens": tokens}) if tokens else None


def check_fit(
    name: str,
    modules: Mapping[str, SiteModule],
    sites: Mapping[str, Site],
    vectors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Raise ExpertError unless the modules of expert `name` fit the base, which has `sites`.

    `vectors` are its gates and means, if any, by what one of them is called in messages. Only here
    are those checked whose module doesn't see the site's input.
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


# One expert alone on its base: a layer with its module at each of its sites.

Layer = TypeVar("Layer", bound="ModifiedLinear")


class ModifiedLinear(WrappedLinear):
    """A linear layer with one expert's module: `module.apply`, at `strength` per token (1 here)."""

    def __init__(
        self, base: nn.Module, module: SiteModule, dtype: torch.dtype | None = None
    ) -> None:
        """`dtype` is the module's type if the weights are packed and have none."""
        super().__init__(base, *linear_shape(base))
        like = self.weight
        if dtype is not None and not like.is_floating_point():
            like = torch.empty(0, dtype=dtype, device=like.device)
        self.module = module.at(like)

    def strength(self, u: Tensor) -> Tensor | float:
        return 1.0

    def forward(self, u: Tensor) -> Tensor:
        return self.module.apply(self.base, u, where_active(self.strength(u), u))


@contextmanager
def applied(
    model: PreTrainedModel, modules: Mapping[str, SiteModule], layer: type[Layer]
) -> Iterator[dict[str, Layer]]:
    """`layer`s with an expert's modules, by site, in `model`; ExpertError if one doesn't fit."""
    check_fit("adapter", modules, find_sites(model))
    layers = {
        site: layer(model.get_submodule(site), each, model.dtype) for site, each in modules.items()
    }
    with replaced(model, layers):
        yield layers
