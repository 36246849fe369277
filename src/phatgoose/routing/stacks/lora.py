"""LoRAs, stacked: all factors of a site in two tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...experts.kinds.lora import LoraFactors
from ..kernels.choice import Kernel
from ..kernels.weighted_rows import weighted_rows
from ..routers.decision import RoutingDecision
from .part import Part, row_tensor
from .rows import widened

__all__ = ["LoraStack"]


@dataclass(frozen=True)
class LoraStack(Part):
    """LoRAs. Ranks that differ are filled up with zeros, which changes no number."""

    names: ClassVar[Mapping[str, str]] = {"A": "A", "B": "B", "bias": "B_bias", "rows": "lora_rows"}
    computed: ClassVar[tuple[str, ...]] = ("A", "B", "bias")
    sized: ClassVar[tuple[str, ...]] = ("A", "B")
    optional: ClassVar[tuple[str, ...]] = ("bias", "rows")

    A: Tensor  # [E, r, n]
    B: Tensor  # [E, r, d], transposed, scale folded in
    bias: Tensor | None = None  # [E, d], scale folded in; None when no expert has one
    rows: Tensor | None = None  # [E] int64; None: all rows of the stack are LoRAs

    @classmethod
    def of(
        cls, loras: Mapping[int, LoraFactors], dtype: torch.dtype, device: torch.device, total: int
    ) -> LoraStack:
        """The stack of `loras` by their rows in the whole stack, which has `total` rows."""
        modules = list(loras.values())
        rank = max(lora.A.shape[0] for lora in modules)
        A = torch.cat([widened(lora.A[None], rank) for lora in modules])
        B = torch.cat([widened(lora.B.T[None], rank) for lora in modules])
        bias = None
        if any(lora.bias is not None for lora in modules):
            zeros = torch.zeros(B.shape[2])
            bias = torch.stack([zeros if lora.bias is None else lora.bias for lora in modules])
        scales = torch.tensor([lora.scale for lora in modules])
        if bool((scales != 1).any()):
            B = B.float() * scales[:, None, None]
            bias = None if bias is None else bias.float() * scales[:, None]
        return cls(
            A.to(device, dtype),
            B.to(device, dtype),
            None if bias is None else bias.to(device, dtype),
            None if len(loras) == total else row_tensor(loras, device),
        )

    def added(self, u: Tensor, chosen: RoutingDecision, kernel: Kernel) -> Tensor:
        """Σ w_z (B_z A_z u + bias_z) for every token of u [T, n] in the type of A, [T, d]."""
        delta = kernel(u, chosen.experts, chosen.weights, self.A, self.B)
        if self.bias is None:
            return delta
        return delta + weighted_rows(chosen.experts, chosen.weights, self.bias)
