"""New LoRAs, as PEFT makes them, at every site (paper section 3).

They are saved in the base's dtype: exactly the numbers that were validated. (PEFT's default casts
every activation up; docs/performance.md has the speeds.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ....base import Base
from ....config import Lora
from ....passes import where_active
from ....sites import Site, dtype_at
from ..kind import FreshExpert, NewModules, new_gate, openness
from ..peft import ADAPTER, peft_options, save_peft, under_peft
from .module import plus_product


class NewLoras(NewModules):
    acts_from_ends = True
    use_dora: ClassVar[bool] = False

    def count(self, model: PreTrainedModel, settings: Lora, sites: Iterable[Site]) -> int:
        return sum(settings.rank * (site.in_features + site.out_features) for site in sites)

    @contextmanager
    def create(
        self, base: Base, settings: Lora, sites: dict[str, Site], *, joint: bool
    ) -> Iterator[FreshExpert]:
        alpha = settings.alpha or 2.0 * settings.rank
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
            lora_dropout=settings.lora_dropout,
            use_rslora=settings.rslora,
            use_dora=self.use_dora,
            **peft_options(base, sites),
        )
        with under_peft(base, config) as model:
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    self.prepare(layer, settings, joint=joint)
            parts = {site: base.model.get_submodule(site).lora_A[ADAPTER] for site in sites}
            yield FreshExpert(model, parts, lambda folder: self.save(model, base, folder))

    def prepare(self, layer: LoraLayer, settings: Lora, *, joint: bool) -> None:
        """Make PEFT's new layer ready to be trained."""
        _use_master_copies(layer, settings.init_std, joint=joint)

    def save(self, model: PeftModel, base: Base, folder: Path) -> None:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                dtype = dtype_at(layer.get_base_layer(), base.model)  # T5's differ in float16
                for factor in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
                    factor.weight.data = factor.weight.data.to(dtype)
        save_peft(model, base, folder)


class _MasterLinear(nn.Linear):
    """A linear layer whose float32 weight is cast to the dtype of its input."""

    def forward(self, u: Tensor) -> Tensor:
        return functional.linear(u, self.weight.to(u.dtype))


class _JointlyGatedLinear(_MasterLinear):
    """A LoRA's A whose output passes the joint gate: PEFT then has B (σ A u), which is σ B A u."""

    def __init__(self, in_features: int, out_features: int, device: torch.device) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.gate = new_gate(in_features, device)

    def forward(self, u: Tensor) -> Tensor:
        return openness(u, self.gate) * super().forward(u)


class _AddedInOneCall(LoraVariant):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's LoRA, whose update is scaled where it is small and added by the product itself."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        u = module.lora_dropout[active_adapter](x)
        h: Any = where_active(module.scaling[active_adapter] * module.lora_A[active_adapter](u), x)
        return plus_product(result, h, module.lora_B[active_adapter].weight.to(x.dtype))


def _use_master_copies(layer: LoraLayer, init_std: float, *, joint: bool) -> None:
    # PEFT would cast activations up to the factors' float32; here factors are cast down.
    layer.cast_input_dtype_enabled = False
    # PEFT's own sum goes three more times over the output, and again in the backward pass.
    layer.lora_variant[ADAPTER] = _AddedInOneCall
    for factors in (layer.lora_A, layer.lora_B):
        plain = factors[ADAPTER]
        shape, device = (plain.in_features, plain.out_features), plain.weight.device
        master = (
            _JointlyGatedLinear(*shape, device)
            if joint and factors is layer.lora_A
            else _MasterLinear(*shape, bias=False, device="meta")
        )
        master.weight = nn.Parameter(plain.weight.detach().float())
        factors[ADAPTER] = master
    nn.init.normal_(layer.lora_A[ADAPTER].weight, std=init_std)
    nn.init.zeros_(layer.lora_B[ADAPTER].weight)
