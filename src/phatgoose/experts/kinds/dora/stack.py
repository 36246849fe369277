"""DoRAs, stacked: their LoRAs, and what their scales of a site's outputs differ from 1 by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..kind import Constant, Held, weighted_rows
from ..lora.module import LoraFactors
from ..lora.stack import LoraStack
from .module import DoraFactors


@dataclass(frozen=True, kw_only=True)
class DoraStack(LoraStack):
    """DoRAs. They aren't compared: without the base, an update's size can't be told."""

    name: ClassVar[str] = "dora"
    held: ClassVar[Mapping[str, Held]] = {
        "A": Held("dora_A", "Drn"),
        "B": Held("dora_B", "Drd"),
        "bias": Held("dora_bias", "Dd", optional=True),
        "rows": Held("dora_rows", "D", "index", optional=True),
        "deltas": Held("dora_deltas", "Dd", "float32"),
    }
    compared: ClassVar[tuple[str, ...]] = ()

    deltas: Tensor  # [E, d], float32

    @classmethod
    def of(
        cls,
        modules: Mapping[int, LoraFactors],
        dtype: torch.dtype,
        device: torch.device,
        total: int,
    ) -> DoraStack:
        lora = LoraStack.of(modules, dtype, device, total)
        scales = [m.output_scale.float() for m in modules.values() if isinstance(m, DoraFactors)]
        return cls(**vars(lora), deltas=(torch.stack(scales) - 1).to(device))

    def output_factor(self, experts: Tensor, weights: Tensor) -> Tensor:
        return 1 + weighted_rows(experts, weights, self.deltas)

    def constant(self, weights: Tensor) -> Constant:
        change = (weights.float()[:, None] * self.deltas).sum(dim=0)
        factor = 1 + change if bool(change.any()) else None
        return replace(super().constant(weights), output_factor=factor)
