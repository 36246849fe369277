"""One expert alone on its base: a layer with its module at each of its sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base.sites import WrappedLinear, find_sites, linear_shape, replace_module
from .adapter import check_fit
from .kinds.kind import SiteModule

__all__ = ["ModifiedLinear", "applied", "replaced"]

Layer = TypeVar("Layer", bound="ModifiedLinear")


class ModifiedLinear(WrappedLinear):
    """A linear layer under one expert's module (`kinds`), at full strength."""

    def __init__(self, base: nn.Module, module: SiteModule) -> None:
        super().__init__(base, *linear_shape(base))
        self.module = module.at(self.weight)

    def strength(self, u: Tensor) -> Tensor | float:
        """The strength at which the module acts on u [.., n]: a number, or [.., 1] by token."""
        return 1.0

    def forward(self, u: Tensor) -> Tensor:
        """[.., n] to [.., d]."""
        return self.module.apply(self.base, u, self.strength(u))


@contextmanager
def applied(
    model: PreTrainedModel, modules: Mapping[str, SiteModule], layer: type[Layer]
) -> Iterator[dict[str, Layer]]:
    """`layer`s with an expert's modules, by site, inside `model` while the context is open.

    Raises ExpertError when a site or its shape doesn't fit the model.
    """
    check_fit("adapter", modules, find_sites(model))
    layers = {site: layer(model.get_submodule(site), each) for site, each in modules.items()}
    with replaced(model, layers):
        yield layers


@contextmanager
def replaced(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """`layers` in the place of submodules of `model`, by name, while the context is open."""
    originals = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            replace_module(model, name, layer)
        yield
    finally:
        for name, original in originals.items():
            replace_module(model, name, original)
