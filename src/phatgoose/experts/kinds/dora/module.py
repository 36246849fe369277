"""DoRA (Liu et al. 2024) on a known base: a LoRA and a scale of the layer's outputs.

A DoRA gives the layer the weight m ⊙ (W + s B A) / ‖W + s B A‖, with the norm of each output's row.
With g = m / ‖W + s B A‖, which is constant, that is g ⊙ (W u) + (g s B) A u, and with the base's
bias b, which it leaves alone:

    (W u + b) ⊙ (1 + σ (g - 1)) + σ ((g s B) A u - (g - 1) ⊙ b)

So experts add up as others do, and one alone is exactly PEFT's. g needs the base's weights, so it
is computed when a DoRA is trained or imported, and stored in a format of our own (docs/format.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kind import AdapterFiles, OwnFiles
from ..lora.module import LoraFactors
from ..peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS

FILES = OwnFiles(
    "dora_config.json",
    "dora.safetensors",
    parts={"lora_A": "rn", "lora_B": "dr", "bias": "d", "output_scale": "d"},
    version_key="dora_version",
    beside=(ADAPTER_CONFIG, ADAPTER_WEIGHTS),  # PEFT's own form of one that was trained here
)


@dataclass(frozen=True, repr=False, kw_only=True)
class DoraFactors(LoraFactors):
    """One site's DoRA: outputs ⊙ `output_scale`, plus the LoRA, whose `scale` is 1."""

    kind: ClassVar[str] = "dora"
    files: ClassVar[AdapterFiles] = FILES

    output_scale: Tensor  # [d]

    @classmethod
    @torch.no_grad()
    def of(cls, lora: LoraFactors, m: Tensor, layer: Any) -> DoraFactors:
        """PEFT's DoRA of these factors and magnitudes m [d] on the base's linear `layer`."""
        B, b = lora.scale * lora.B.float(), layer.bias
        g = row_scales(layer, lora.A, B, m)
        bias = torch.zeros_like(g) if b is None else (1 - g) * b.float()
        return cls(A=lora.A, B=g[:, None] * B, scale=1.0, bias=bias, output_scale=g)

    def at(self, weight: Tensor) -> DoraFactors:
        lora = super().at(weight)
        # Not the weight's type: as for (IA)³, around 1 bfloat16 is too coarse.
        scale = self.output_scale.to(weight.device, torch.float32)
        return DoraFactors(**vars(lora), output_scale=scale)

    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        def scaled(u: Tensor) -> Tensor:
            y: Tensor = base(u)
            return (y * (1 + strength * (self.output_scale - 1))).to(y.dtype)

        return super().apply(scaled, u, strength)  # type: ignore[arg-type]

    @classmethod
    def read(
        cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> dict[str, LoraFactors]:
        return {
            site: cls(A=A, B=B, scale=1.0, bias=bias, output_scale=scale)
            for site, (A, B, bias, scale) in FILES.by_site(directory, tensors).items()
        }

    @classmethod
    def write(cls, folder: Path, modules: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
        tensors = {site: (m.A, m.B, m.bias, m.output_scale) for site, m in modules.items()}
        return FILES.write(folder, tensors, about)


def row_scales(layer: Any, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
    """The factor m / ‖W + B A‖ [d], float32, on the linear `layer`; 0 for rows of zeros.

    As in PEFT, no gradient passes the norm (Liu et al. 2024, section 4.3).
    """
    return m.float() / row_norms(layer, A, B)


@torch.no_grad()
def row_norms(layer: Any, A: Tensor, B: Tensor) -> Tensor:
    """‖W + B A‖ of each output [d], float32, and infinity for 0."""
    W = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    norms = torch.linalg.vector_norm(W.float() + B.float() @ A.float(), dim=1)
    return torch.where(norms > 0, norms, torch.inf)
