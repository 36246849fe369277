"""(IA)³ vectors, stacked: those that scale a site's input, and those that scale its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..kind import Constant, Held, Part, row_tensor, weighted_rows
from .module import ScalingVector

Stack = TypeVar("Stack", bound="ScalingStack")


@dataclass(frozen=True)
class ScalingStack(Part):
    """(IA)³ vectors as what they differ from 1 by, l - 1, in float32."""

    compared: ClassVar[tuple[str, ...]] = ("deltas",)

    deltas: Tensor  # [E, n] or [E, d]
    rows: Tensor  # [E] int64

    @classmethod
    def of(
        cls: type[Stack],
        modules: Mapping[int, ScalingVector],
        dtype: torch.dtype,
        device: torch.device,
        total: int,
    ) -> Stack:
        deltas = torch.stack([scaling.vector.float() - 1 for scaling in modules.values()])
        return cls(deltas.to(device), row_tensor(modules, device))

    def factor(self, experts: Tensor, weights: Tensor) -> Tensor:
        """1 + Σ w_z (l_z - 1) for every token, float32."""
        return 1 + weighted_rows(experts, weights, self.deltas)

    def constant_factor(self, weights: Tensor) -> Tensor | None:
        change = (weights.float()[:, None] * self.deltas).sum(dim=0)
        return 1 + change if bool(change.any()) else None


@dataclass(frozen=True)
class InputScalingStack(ScalingStack):
    name: ClassVar[str] = "input_scaling"
    held: ClassVar[Mapping[str, Held]] = {
        "deltas": Held("input_deltas", "In", "float32"),
        "rows": Held("input_rows", "I", "index"),
    }

    @classmethod
    def stacks(cls, module: ScalingVector) -> bool:
        return module.on_input

    def input_factor(self, experts: Tensor, weights: Tensor) -> Tensor:
        return self.factor(experts, weights)

    def constant(self, weights: Tensor) -> Constant:
        return Constant(input_factor=self.constant_factor(weights))


@dataclass(frozen=True)
class OutputScalingStack(ScalingStack):
    name: ClassVar[str] = "output_scaling"
    held: ClassVar[Mapping[str, Held]] = {
        "deltas": Held("output_deltas", "Od", "float32"),
        "rows": Held("output_rows", "O", "index"),
    }

    @classmethod
    def stacks(cls, module: ScalingVector) -> bool:
        return not module.on_input

    def output_factor(self, experts: Tensor, weights: Tensor) -> Tensor:
        return self.factor(experts, weights)

    def constant(self, weights: Tensor) -> Constant:
        return Constant(output_factor=self.constant_factor(weights))
