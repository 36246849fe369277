"""New DoRAs, as PEFT makes them, at every site (Liu et al. 2024).

A magnitude m starts as the norm of its row of W. Unlike PEFT's, ours and the norms stay float32
under a base of 16 bits, where g = m / ‖W + s B A‖ would have steps of 1/128 around 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ....base import Base
from ....config import Lora
from ....passes import where_active
from ....sites import Site
from ..kind import openness
from ..lora.module import LoraFactors, plus_product
from ..lora.training import NewLoras
from ..peft import ADAPTER
from .module import FILES, DoraFactors, row_norms, row_scales


class NewDoras(NewLoras):
    use_dora = True
    copies = 2  # PEFT's files, and ours made of them
    on_packed = False  # what we store of W's norms would be those of other weights

    def count(self, model: PreTrainedModel, settings: Lora, sites: Iterable[Site]) -> int:
        sites = list(sites)
        return super().count(model, settings, sites) + sum(site.out_features for site in sites)

    def prepare(self, layer: LoraLayer, settings: Lora, *, joint: bool) -> None:
        super().prepare(layer, settings, joint=joint)
        layer.lora_variant[ADAPTER] = _ScaledOutputs
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        norms = row_norms(layer.get_base_layer(), A, B)
        norms[norms.isinf()] = 0
        layer.lora_magnitude_vector[ADAPTER].weight = nn.Parameter(norms)

    def save(self, model: PeftModel, base: Base, folder: Path) -> None:
        super().save(model, base, folder)  # in the dtype that is computed in
        made = {}
        for site, layer in base.model.named_modules():
            if isinstance(layer, LoraLayer):
                A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                lora = LoraFactors(A, B, layer.scaling[ADAPTER])
                m = layer.lora_magnitude_vector[ADAPTER].weight
                made[site] = DoraFactors.of(lora, m, layer.get_base_layer())
        DoraFactors.write(folder, made, {FILES.base_key: base.id})


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
        u = module.lora_dropout[active_adapter](x)
        y = result if u is x else base(u)  # dropout is on W u too, as in PEFT
        y = y if base.bias is None else y - base.bias
        gate = lora_A._parameters.get("gate")
        strength: Any = where_active(1.0 if gate is None else openness(u, gate), x)
        scaled = (result + strength * (g - 1) * y).to(x.dtype)
        h = strength * functional.linear(u, A)
        return plus_product(scaled, h, (g[:, None] * B).to(x.dtype))
