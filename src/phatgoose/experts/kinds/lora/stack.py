"""LoRAs, stacked: all factors of a site in two tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..kind import Constant, Held, Part, Product, row_tensor, weighted_rows
from .module import LoraFactors


@dataclass(frozen=True)
class LoraStack(Part):
    """LoRAs. Ranks that differ are filled up with zeros, which changes no number."""

    name: ClassVar[str] = "lora"
    held: ClassVar[Mapping[str, Held]] = {
        "A": Held("A", "Prn"),
        "B": Held("B", "Prd"),
        "bias": Held("B_bias", "Pd", optional=True),
        "rows": Held("lora_rows", "P", "index", optional=True),
    }
    compared: ClassVar[tuple[str, ...]] = ("A", "B")

    A: Tensor  # [E, r, n]
    B: Tensor  # [E, r, d], transposed, scale folded in
    bias: Tensor | None = None  # [E, d], scale folded in; None when no expert has one
    rows: Tensor | None = None  # [E] int64; None: all rows of the stack are LoRAs

    @classmethod
    def of(
        cls,
        modules: Mapping[int, LoraFactors],
        dtype: torch.dtype,
        device: torch.device,
        total: int,
    ) -> LoraStack:
        loras = list(modules.values())
        rank = max(lora.A.shape[0] for lora in loras)
        A = torch.cat([widened(lora.A[None], rank) for lora in loras])
        # Transposed: A and B then unfold to [E r, ..] without a copy.
        B = torch.cat([widened(lora.B.T[None], rank) for lora in loras])
        bias = None
        if any(lora.bias is not None for lora in loras):
            zeros = torch.zeros(B.shape[2])
            bias = torch.stack([zeros if lora.bias is None else lora.bias for lora in loras])
        scales = torch.tensor([lora.scale for lora in loras])
        if bool((scales != 1).any()):
            B = B.float() * scales[:, None, None]
            bias = None if bias is None else bias.float() * scales[:, None]
        return cls(
            A.to(device, dtype),
            B.to(device, dtype),
            None if bias is None else bias.to(device, dtype),
            None if len(loras) == total else row_tensor(modules, device),
        )

    def added(
        self, u: Tensor, y: Tensor, experts: Tensor, weights: Tensor, product: Product
    ) -> Tensor:
        delta = product(u.to(self.A.dtype), experts, weights, self.A, self.B)
        return delta if self.bias is None else delta + weighted_rows(experts, weights, self.bias)

    def constant(self, weights: Tensor) -> Constant:
        used = weights != 0
        A, B, w = self.A[used], self.B[used], weights[used].float()
        # Factors of weight 1 keep their type, and so their very numbers.
        if bool((w != 1).any()):
            A, B = A.float(), B.float() * w[:, None, None]
        bias = None if self.bias is None else (w[:, None] * self.bias[used].float()).sum(dim=0)
        A, B = A.flatten(0, 1), B.flatten(0, 1).T
        # Ranks that were filled up with zeros go.
        adds = A.any(dim=1) & B.any(dim=0)
        return Constant(A[adds], B[:, adds], bias)


def widened(tensor: Tensor, width: int) -> Tensor:
    """A tensor [E, r, ..] with zeros up to `width` in its second dimension."""
    missing = width - tensor.shape[1]
    return functional.pad(tensor, (*[0, 0] * (tensor.dim() - 2), 0, missing)) if missing else tensor
