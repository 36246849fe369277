"""(IA)³ vectors, stacked: those that scale the site's input, and those that scale its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ...experts.kinds.ia3 import ScalingVector
from ..kernels.weighted_rows import weighted_rows
from ..routers.decision import RoutingDecision
from .part import Part, row_tensor

__all__ = ["InputScalingStack", "OutputScalingStack", "ScalingStack"]

Kind = TypeVar("Kind", bound="ScalingStack")


@dataclass(frozen=True)
class ScalingStack(Part):
    """(IA)³ vectors as what they differ from 1 by, l - 1, in float32."""

    deltas: Tensor  # [E, n] or [E, d]
    rows: Tensor  # [E] int64

    @classmethod
    def of(cls: type[Kind], scalings: Mapping[int, ScalingVector], device: torch.device) -> Kind:
        """The stack of `scalings` by their rows in the whole stack."""
        deltas = torch.stack([scaling.vector.float() - 1 for scaling in scalings.values()])
        return cls(deltas.to(device), row_tensor(scalings, device))

    def factor(self, chosen: RoutingDecision) -> Tensor:
        """1 + Σ w_z (l_z - 1) for every token, float32."""
        return 1 + weighted_rows(chosen.experts, chosen.weights, self.deltas)


@dataclass(frozen=True)
class InputScalingStack(ScalingStack):
    """Vectors that scale the input of the site's linear layer."""

    names: ClassVar[Mapping[str, str]] = {"deltas": "input_deltas", "rows": "input_rows"}


@dataclass(frozen=True)
class OutputScalingStack(ScalingStack):
    """Vectors that scale its output."""

    names: ClassVar[Mapping[str, str]] = {"deltas": "output_deltas", "rows": "output_rows"}
