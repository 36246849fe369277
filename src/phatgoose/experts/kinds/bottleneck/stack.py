"""Bottleneck adapters, stacked, and the sum over chosen ones.

    sum over z of w_z (U_z f_z(D_z y + b_z) + c_z)     for outputs y of a site

Two methods compute it, with the same numbers and gradients up to rounding:

    side_by_side  all experts for all tokens, static shapes  few experts
    grouped       tokens sorted by expert                    many
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ....config import ACTIVATIONS
from ..kind import Held, Part, Product, dense_weights, expert_products, row_tensor, weighted_rows
from .module import ACTIVATION, BottleneckLayers


@dataclass(frozen=True)
class BottleneckStack(Part):
    """Bottleneck adapters. Sizes that differ are filled up with zeros, which changes no number."""

    name: ClassVar[str] = "bottleneck"
    held: ClassVar[Mapping[str, Held]] = {
        "down": Held("down", "Nmd"),
        "down_bias": Held("down_bias", "Nm"),
        "up": Held("up", "Nmd"),
        "up_bias": Held("up_bias", "Nd"),
        "activations": Held("activations", "N", "index"),
        "rows": Held("bottleneck_rows", "N", "index"),
    }
    compared: ClassVar[tuple[str, ...]] = ("down", "up")

    down: Tensor  # [E, m, d]
    down_bias: Tensor  # [E, m]
    up: Tensor  # [E, m, d], transposed, scale folded in
    up_bias: Tensor  # [E, d], scale folded in
    activations: Tensor  # [E] int64, indices into ACTIVATIONS
    rows: Tensor  # [E] int64

    @classmethod
    def of(
        cls,
        modules: Mapping[int, BottleneckLayers],
        dtype: torch.dtype,
        device: torch.device,
        total: int,
    ) -> BottleneckStack:
        adapters = list(modules.values())
        E, size, d = len(adapters), max(a.size for a in adapters), adapters[0].out_features
        activations = [ACTIVATIONS.index(adapter.activation) for adapter in adapters]
        stack = cls(
            down=torch.zeros(E, size, d, dtype=dtype, device=device),
            down_bias=torch.zeros(E, size, dtype=dtype, device=device),
            up=torch.zeros(E, size, d, dtype=dtype, device=device),
            up_bias=torch.zeros(E, d, dtype=dtype, device=device),
            activations=torch.tensor(activations, device=device),
            rows=row_tensor(modules, device),
        )
        for i, adapter in enumerate(adapters):
            own = adapter.size
            stack.down[i, :own], stack.down_bias[i, :own] = adapter.down, adapter.down_bias
            stack.up[i, :own] = _scaled(adapter.up, adapter.scale).T
            stack.up_bias[i] = _scaled(adapter.up_bias, adapter.scale)
        return stack

    def problem(self) -> str | None:
        least, most = (int(end) for end in self.activations.aminmax())
        if least < 0 or most >= len(ACTIVATIONS):
            wanted = f"0 to {len(ACTIVATIONS) - 1}"
            return f"activations has numbers from {least} to {most}; wanted {wanted}"
        return None

    def added(
        self, u: Tensor, y: Tensor, experts: Tensor, weights: Tensor, product: Product
    ) -> Tensor:
        y = y.to(self.down.dtype)
        few = len(self.down) <= 2 * experts.shape[1]  # at most half of the experts are left out
        # Counts are read back, which would wait for another device or break a compiled graph.
        may_read_counts = y.device.type == "cpu" and not torch.compiler.is_compiling()
        if few or not may_read_counts:
            return self.side_by_side(y, experts, weights)
        return self.grouped(y, experts, weights)

    # Each of these takes outputs y [T, d] and chosen experts [T, k] with their weights, which are
    # zero where a token chose something else; [T, d] in the dtype of y comes back.

    def side_by_side(self, y: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        E, m, d = self.down.shape
        dense = dense_weights(experts, weights, E).to(y.dtype)
        inner = (y @ self.down.reshape(E * m, d).T).view(-1, E, m) + self.down_bias
        inner = _activated(inner, self.activations.unsqueeze(-1)) * dense.unsqueeze(-1)
        return inner.view(-1, E * m) @ self.up.reshape(E * m, d) + dense @ self.up_bias

    def grouped(self, y: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        # Weights of zero (experts of other parts) cost nothing.
        pairs = weights.flatten().nonzero().squeeze(1)
        chosen = experts.flatten()[pairs]
        order = chosen.argsort(stable=True)
        pairs, chosen = pairs[order], chosen[order]
        tokens = pairs // experts.shape[1]
        counts = chosen.bincount(minlength=len(self.down))
        inner = expert_products(y[tokens], self.down.transpose(1, 2), counts)
        inner = _activated(inner + self.down_bias[chosen], self.activations[chosen].unsqueeze(-1))
        inner = inner * weights.flatten()[pairs].unsqueeze(-1).to(y.dtype)
        outer = expert_products(inner, self.up, counts)  # [pairs, d]
        total = weighted_rows(experts, weights, self.up_bias).to(y.dtype)
        return total.index_add(0, tokens, outer.to(total.dtype))  # under autocast they differ


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else scale * tensor.float()


def _activated(inner: Tensor, activations: Tensor) -> Tensor:
    result = torch.zeros_like(inner)
    for index, name in enumerate(ACTIVATIONS):
        # Every function for all, since choosing by rows would read indices back.
        result = torch.where(activations == index, ACTIVATION[name](inner), result)
    return result
