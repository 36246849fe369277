"""One expert alone on its base, with or without gates: a layer with its module at each site."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..sites import WrappedLinear, dtype_at, find_sites, replaced
from ..tasks.batching import where_active
from .module import Modules, SiteModule, check_fit


def new_gate(layer: WrappedLinear) -> nn.Parameter:
    return nn.Parameter(torch.zeros(layer.in_features, device=layer.weight.device))


def strength_at(u: Tensor, v: Tensor | None) -> Tensor | float:
    """The strength σ at each token of u [.., n]: how far its gate v [n], if any, is open.

    That is `sigmoid(v . u)`, [.., 1]; 0 at tokens that the expert doesn't act on.
    """
    if v is None:
        return where_active(1.0, u)
    opened = (u @ v.to(u.dtype)).float().sigmoid().to(u.dtype)
    return where_active(opened.unsqueeze(-1), u)


class ModifiedLinear(WrappedLinear):
    """A linear layer with one expert's module, behind a gate v that starts at zeros if `gated`.

    A LoRA's output is then `W u + scale * B A u * sigmoid(v . u)`, without a bias in the sigmoid
    (paper section 3). A module of another kind acts at the strength of the sigmoid.
    """

    gate: nn.Parameter  # None unless `gated`

    def __init__(
        self, base: nn.Module, module: SiteModule, dtype: torch.dtype, *, gated: bool
    ) -> None:
        super().__init__(base)
        self.module = module.at(torch.empty(0, dtype=dtype, device=self.weight.device))
        self.register_parameter("gate", new_gate(self) if gated else None)

    def forward(self, u: Tensor) -> Tensor:
        return self.module.apply(self.base, u, strength_at(u, self.gate))


@contextmanager
def applied(
    model: PreTrainedModel, modules: Modules, *, gated: bool = False
) -> Iterator[dict[str, ModifiedLinear]]:
    """`model` with an expert's modules by site, `gated` or not; ExpertError if one doesn't fit."""
    check_fit("adapter", modules, find_sites(model))
    layers = {}
    for site, module in modules.items():
        layer = model.get_submodule(site)
        layers[site] = ModifiedLinear(layer, module, dtype_at(layer, model), gated=gated)
    with replaced(model, layers):
        yield layers
