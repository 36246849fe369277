"""DoRA (Liu et al. 2024) on a known base: a LoRA and a scale of the layer's outputs.

A DoRA gives the layer the weight m ⊙ (W + s B A) / ‖W + s B A‖, with the norm of each output's row.
With g = m / ‖W + s B A‖, which is constant, that is g ⊙ (W u) + (g s B) A u, and with the base's
bias b, which it leaves alone:

    (W u + b) ⊙ (1 + σ (g - 1)) + σ ((g s B) A u - (g - 1) ⊙ b)

So experts add up as others do, and one alone is exactly PEFT's. g needs the base's weights, so it
is computed when a DoRA is trained or imported, and stored in a format of our own (docs/format.md).

DoRAs, stacked: their LoRAs, and what their scales of a site's outputs differ from 1 by.

New DoRAs, as PEFT makes them, at every site (Liu et al. 2024).

A magnitude m starts as the norm of its row of W. Unlike PEFT's, ours and the norms stay float32
under a base of 16 bits, where g = m / ‖W + s B A‖ would have steps of 1/128 around 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..base import Base
from ..config import Lora
from ..passes import where_active
from .kind import Constant, OwnFiles, SiteModule, factor_of, openness, stacked, weighted_rows
from .lora import LoraFactors, LoraStack, NewLoras, plus_product
from .peft_files import ADAPTER


@dataclass(frozen=True, repr=False, kw_only=True)
class DoraFactors(LoraFactors):
    """One site's DoRA: outputs ⊙ `output_scale`, plus the LoRA, whose `scale` is 1."""

    kind: ClassVar[str] = "dora"
    files: ClassVar[Any] = OwnFiles(
        "dora_config.json", "dora.safetensors", version_key="dora_version"
    )
    parts: ClassVar[Mapping[str, str]] = {**LoraFactors.parts, "output_scale": "d"}
    endings: ClassVar[Mapping[str, str]] = {"A": ".lora_A", "B": ".lora_B"}
    # Not as LoRAs: in files of our own.
    read = SiteModule.__dict__["read"]
    write = SiteModule.__dict__["write"]

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


@dataclass(frozen=True, kw_only=True)
class DoraStack(LoraStack):
    """DoRAs. They aren't compared: without the base, an update's size can't be told."""

    name: ClassVar[str] = "dora"
    prefix: ClassVar[str | None] = None
    compared: ClassVar[tuple[str, ...]] = ()

    deltas: Tensor = stacked("d", "float32")

    @classmethod
    def row(cls, module: Any) -> dict[str, Tensor | None]:
        return {**super().row(module), "deltas": module.output_scale.float() - 1}

    def output_factor(self, experts: Tensor, weights: Tensor) -> Tensor:
        return 1 + weighted_rows(experts, weights, self.deltas)

    def constant(self, weights: Tensor) -> Constant:
        return replace(super().constant(weights), output_factor=factor_of(weights, self.deltas))


class NewDoras(NewLoras):
    use_dora = True
    on_packed = False  # what we store of W's norms would be those of other weights

    def prepare(self, layer: LoraLayer, settings: Lora, *, joint: bool) -> None:
        super().prepare(layer, settings, joint=joint)
        layer.lora_variant[ADAPTER] = _ScaledOutputs
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        norms = row_norms(layer.get_base_layer(), A, B)
        norms[norms.isinf()] = 0
        layer.lora_magnitude_vector[ADAPTER].weight = nn.Parameter(norms)

    def save(self, model: PeftModel, base: Base, folder: Path) -> None:
        doras = {}
        for site, layer in self.rounded(base).items():
            A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            lora = LoraFactors(A, B, layer.scaling[ADAPTER])
            m = layer.lora_magnitude_vector[ADAPTER].weight
            doras[site] = DoraFactors.of(lora, m, layer.get_base_layer())
        DoraFactors.write(folder, doras, {DoraFactors.files.base_key: base.id})


class _ScaledOutputs(LoraVariant):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's DoRA, at the strength of the joint gate and of the tokens that it acts on."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        base, lora_A = module.get_base_layer(), module.lora_A[active_adapter]
        A = lora_A.weight.to(x.dtype)
        B = module.lora_B[active_adapter].weight.to(x.dtype)  # as it is saved
        B = module.scaling[active_adapter] * B.float()
        m = module.lora_magnitude_vector[active_adapter].weight
        g = row_scales(base, A, B, m)
        y = result if base.bias is None else result - base.bias
        gate = lora_A._parameters.get("gate")
        strength: Any = where_active(1.0 if gate is None else openness(x, gate), x)
        scaled = (result + strength * (g - 1) * y).to(x.dtype)
        h = strength * functional.linear(x, A)
        return plus_product(scaled, h, (g[:, None] * B).to(x.dtype))
