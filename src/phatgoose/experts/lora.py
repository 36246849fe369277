"""LoRA (Hu et al. 2021; paper section 3): W u + b + σ scale (B A u + b_B).

b_B is there only where PEFT's lora_bias is on. Stored in PEFT's files (`peft`).

LoRAs, stacked: all factors of a site in two tensors.

New LoRAs, as PEFT makes them, at every site (paper section 3).

They are saved in the base's dtype: exactly the numbers that were validated. (PEFT's default casts
every activation up; docs/performance.md has the speeds.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn import functional

from ..base import Base
from ..config import INIT_STD, Lora
from ..files import value_at
from ..passes import where_active
from ..sites import Site, dtype_at
from .kind import (
    Constant,
    FreshExpert,
    NewModules,
    Part,
    Product,
    SiteModule,
    new_gate,
    openness,
    scaled,
    stacked,
    weighted_rows,
)
from .peft_files import (
    ADAPTER,
    PEFT_FILES,
    peft_options,
    save_peft,
    under_peft,
    write_adapter,
)

ENDINGS = {"A": ".lora_A.weight", "B": ".lora_B.weight", "bias": ".lora_B.bias"}  # in PEFT's files


@dataclass(frozen=True, repr=False)
class LoraFactors(SiteModule):
    """One site's LoRA: the update is `scale * (B @ A @ u + bias)`."""

    kind: ClassVar[str] = "lora"
    files: ClassVar[Any] = PEFT_FILES
    parts: ClassVar[Mapping[str, str]] = {"A": "rn", "B": "dr", "bias": "d"}
    endings: ClassVar[Mapping[str, str]] = ENDINGS

    A: Tensor  # [r, n]
    B: Tensor  # [d, r]
    scale: float = 1.0
    bias: Tensor | None = None  # [d]

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
    ) -> Mapping[str, SiteModule]:
        forms = {"A": "rn", "B": "dr"} | ({"bias": "d"} if config.get("lora_bias") else {})
        by_site = PEFT_FILES.by_site(directory, tensors, forms, ENDINGS)
        alphas, default = config.get("alpha_pattern") or {}, config.get("lora_alpha", 8)
        modules = {}
        for site, parts in by_site.items():
            # Of several patterns the first that matches counts, as in PEFT.
            alpha, rank = value_at(alphas, site), len(parts["A"])
            alpha = float(default if alpha is None else alpha)
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            modules[site] = LoraFactors(**parts, scale=scale)
        return modules

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
        tensors: dict[str, Tensor] = {}
        for site, lora in modules.items():
            tensors |= {site + ENDINGS["A"]: lora.A, site + ENDINGS["B"]: lora.B}
            if has_biases:  # PEFT's lora_bias is for all sites or none
                bias = lora.B.new_zeros(len(lora.B)) if lora.bias is None else lora.bias
                tensors[site + ENDINGS["bias"]] = bias
        return write_adapter(folder, config, modules, tensors)


def plus_product(y: Tensor, h: Tensor, B: Tensor) -> Tensor:
    """The sum y + B h, [.., d], of h [.., r] and B [d, r], in one call that rounds once."""
    total = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.t())
    return total.view_as(y)


@dataclass(frozen=True)
class LoraStack(Part):
    """LoRAs. Ranks that differ are filled up with zeros, which changes no number."""

    name: ClassVar[str] = "lora"
    prefix: ClassVar[str | None] = ""
    compared: ClassVar[tuple[str, ...]] = ("A", "B")

    A: Tensor = stacked("rn")
    B: Tensor = stacked("rd")  # transposed, so that both unfold to [E r, ..]; scale folded in
    B_bias: Tensor | None = stacked("d", optional=True)  # scale folded in

    @classmethod
    def row(cls, module: LoraFactors) -> dict[str, Tensor | None]:
        bias = None if module.bias is None else scaled(module.bias, module.scale)
        return {"A": module.A, "B": scaled(module.B, module.scale).T, "B_bias": bias}

    def added(
        self, u: Tensor, y: Tensor, experts: Tensor, weights: Tensor, product: Product
    ) -> Tensor:
        delta = product(u.to(self.A.dtype), experts, weights, self.A, self.B)
        bias = self.B_bias
        return delta if bias is None else delta + weighted_rows(experts, weights, bias)

    def constant(self, weights: Tensor) -> Constant:
        used = weights != 0
        A, B, w = self.A[used], self.B[used], weights[used].float()
        # Factors of weight 1 keep their type, and so their very numbers.
        if bool((w != 1).any()):
            A, B = A.float(), B.float() * w[:, None, None]
        bias = self.B_bias
        bias = None if bias is None else (w[:, None] * bias[used].float()).sum(dim=0)
        A, B = A.flatten(0, 1), B.flatten(0, 1).T
        # Ranks that were filled up with zeros go.
        adds = A.any(dim=1) & B.any(dim=0)
        return Constant(A[adds], B[:, adds], bias)


class NewLoras(NewModules):
    use_dora: ClassVar[bool] = False

    @contextmanager
    def create(
        self, base: Base, settings: Lora, sites: dict[str, Site], *, joint: bool
    ) -> Iterator[FreshExpert]:
        alpha = settings.alpha or 2.0 * settings.rank
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
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
        """Make PEFT's new layer ready to be trained: factors become float32 master copies."""
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
        nn.init.normal_(layer.lora_A[ADAPTER].weight, std=INIT_STD)
        nn.init.zeros_(layer.lora_B[ADAPTER].weight)

    def save(self, model: PeftModel, base: Base, folder: Path) -> None:
        self.rounded(base)
        save_peft(model, base, folder)

    def rounded(self, base: Base) -> dict[str, Any]:
        """PEFT's layers by site, their factors from now on in the type that is computed in."""
        modules = base.model.named_modules()
        layers: dict[str, Any] = {s: each for s, each in modules if isinstance(each, LoraLayer)}
        for layer in layers.values():
            dtype = dtype_at(layer.get_base_layer(), base.model)  # T5's differ in float16
            for factor in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
                factor.weight.data = factor.weight.data.to(dtype)
        return layers


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
        h: Any = where_active(module.scaling[active_adapter] * module.lora_A[active_adapter](x), x)
        return plus_product(result, h, module.lora_B[active_adapter].weight.to(x.dtype))
