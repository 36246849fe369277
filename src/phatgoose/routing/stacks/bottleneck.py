"""Bottleneck adapters, stacked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...config import ACTIVATIONS
from ...experts.kinds.bottleneck import BottleneckLayers
from ..kernels.bottlenecks import choose_bottleneck
from ..routers.decision import RoutingDecision
from .part import Part, row_tensor

__all__ = ["BottleneckStack"]

FIELDS = ("down", "down_bias", "up", "up_bias")


@dataclass(frozen=True)
class BottleneckStack(Part):
    """Bottleneck adapters. Sizes that differ are filled up with zeros, which changes no number."""

    names: ClassVar[Mapping[str, str]] = {
        **{field: field for field in (*FIELDS, "activations")},
        "rows": "bottleneck_rows",
    }
    computed: ClassVar[tuple[str, ...]] = FIELDS
    sized: ClassVar[tuple[str, ...]] = ("down", "up", "down_bias")

    down: Tensor  # [E, m, d]
    down_bias: Tensor  # [E, m]
    up: Tensor  # [E, m, d], transposed, scale folded in
    up_bias: Tensor  # [E, d], scale folded in
    activations: Tensor  # [E] int64, indices into ACTIVATIONS
    rows: Tensor  # [E] int64

    @classmethod
    def of(
        cls, adapters: Mapping[int, BottleneckLayers], dtype: torch.dtype, device: torch.device
    ) -> BottleneckStack:
        """The stack of `adapters` by their rows in the whole stack."""
        modules = list(adapters.values())
        E, size, d = len(modules), max(m.down.shape[0] for m in modules), modules[0].up.shape[0]
        activations = [ACTIVATIONS.index(module.activation) for module in modules]
        stack = cls(
            down=torch.zeros(E, size, d, dtype=dtype, device=device),
            down_bias=torch.zeros(E, size, dtype=dtype, device=device),
            up=torch.zeros(E, size, d, dtype=dtype, device=device),
            up_bias=torch.zeros(E, d, dtype=dtype, device=device),
            activations=torch.tensor(activations, device=device),
            rows=row_tensor(adapters, device),
        )
        for i, module in enumerate(modules):
            own = module.down.shape[0]
            stack.down[i, :own], stack.down_bias[i, :own] = module.down, module.down_bias
            stack.up[i, :own] = _scaled(module.up, module.scale).T
            stack.up_bias[i] = _scaled(module.up_bias, module.scale)
        return stack

    def added(self, y: Tensor, chosen: RoutingDecision) -> Tensor:
        """Σ w_z (U_z f_z(D_z y + b_z) + c_z) for every token of y [T, d], [T, d]."""
        arguments = (y.to(self.down.dtype), chosen.experts)
        product = choose_bottleneck(*arguments, self.down)
        return product(
            *(*arguments, chosen.weights, self.down, self.down_bias),
            *(self.up, self.up_bias, self.activations),
        )


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else scale * tensor.float()
