"""LoRA (Hu et al. 2021; paper section 3): W u + b + σ scale (B A u + b_B).

b_B is there only where PEFT's lora_bias is on. Stored in PEFT's files (`peft`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....errors import ExpertError
from ....files import value_at
from ..kind import AdapterFiles, SiteModule, are_floats
from ..peft import ADAPTER_WEIGHTS, PEFT_FILES, PEFT_PREFIX, site_of, write_adapter

LORA_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias")


@dataclass(frozen=True, repr=False)
class LoraFactors(SiteModule):
    """One site's LoRA: the update is `scale * (B @ A @ u + bias)`."""

    kind: ClassVar[str] = "lora"
    files: ClassVar[AdapterFiles] = PEFT_FILES

    A: Tensor  # [r, n]
    B: Tensor  # [d, r]
    scale: float
    bias: Tensor | None = None  # [d]

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.B.shape[0]

    @property
    def size(self) -> int:
        return self.A.shape[0]

    def at(self, weight: Tensor) -> LoraFactors:
        # Scaled in float32 and rounded once.
        B = (self.scale * self.B.float()).to(weight)
        bias = None if self.bias is None else (self.scale * self.bias.float()).to(weight)
        return LoraFactors(self.A.to(weight), B, 1.0, bias)

    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        y: Tensor = base(u)
        if self.bias is not None:
            y = y + strength * self.bias
        return plus_product(y, strength * functional.linear(u, self.A), self.B)

    @classmethod
    def read(
        cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> dict[str, LoraFactors]:
        scale_of, has_biases = _scale_rule(config), bool(config.get("lora_bias"))
        factors = {}
        for site in sorted({site_of(key, LORA_ENDINGS, directory) for key in tensors}):
            A, B, bias = (tensors.get(f"{PEFT_PREFIX}{site}{ending}") for ending in LORA_ENDINGS)
            if A is None or B is None or not _are_factors(A, B):
                got = [None if side is None else tuple(side.shape) for side in (A, B)]
                raise ExpertError(
                    f"{directory}, site {site}: wanted A of shape (r, n) and B of (d, r), in "
                    f"floating point, got {got[0]} and {got[1]}."
                )
            if (bias is None) == has_biases or (bias is not None and not _is_bias(bias, B)):
                raise ExpertError(
                    f"{directory}, site {site}: its config says lora_bias {has_biases}, but the "
                    f"bias of B is {None if bias is None else tuple(bias.shape)}."
                )
            factors[site] = LoraFactors(A, B, scale_of(site, A.shape[0]), bias)
        if not factors:
            raise ExpertError(f"{directory}: {ADAPTER_WEIGHTS} holds no LoRA factors.")
        return factors

    @classmethod
    def write(
        cls, folder: Path, modules: Mapping[str, LoraFactors], about: Mapping[str, Any]
    ) -> Path:
        ranks = {site: lora.A.shape[0] for site, lora in modules.items()}
        alphas = {site: lora.scale * ranks[site] for site, lora in modules.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        has_biases = any(lora.bias is not None for lora in modules.values())
        config = {
            **about,
            "peft_type": "LORA",
            "bias": "none",
            "lora_bias": has_biases,
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {site: own for site, own in ranks.items() if own != rank},
            "alpha_pattern": {site: own for site, own in alphas.items() if own != alpha},
        }
        tensors = {}
        for site, lora in modules.items():
            # PEFT's lora_bias is for all sites or none.
            bias = lora.B.new_zeros(lora.B.shape[0]) if lora.bias is None else lora.bias
            parts = (lora.A, lora.B, bias) if has_biases else (lora.A, lora.B)
            for ending, part in zip(LORA_ENDINGS, parts, strict=False):
                tensors[site + ending] = part
        return write_adapter(folder, config, modules, tensors)


def plus_product(y: Tensor, h: Tensor, B: Tensor) -> Tensor:
    """The sum y + B h, [.., d], of h [.., r] and B [d, r], in one call that rounds once."""
    total = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.t())
    return total.view_as(y)


def _are_factors(A: Tensor, B: Tensor) -> bool:
    matrices = A.dim() == 2 and B.dim() == 2 and A.shape[0] == B.shape[1] > 0
    return matrices and are_floats(A, B)


def _is_bias(bias: Tensor, B: Tensor) -> bool:
    return bias.shape == B.shape[:1] and are_floats(bias)


def _scale_rule(config: Mapping[str, Any]) -> Callable[[str, int], float]:
    alphas = config.get("alpha_pattern") or {}
    root = bool(config.get("use_rslora"))
    default = float(config.get("lora_alpha", 8))

    def scale(site: str, rank: int) -> float:
        # Of several patterns the first that matches counts, as in PEFT.
        alpha = value_at(alphas, site)
        alpha = default if alpha is None else float(alpha)
        return alpha / (math.sqrt(rank) if root else rank)

    return scale
