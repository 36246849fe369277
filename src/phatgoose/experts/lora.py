"""LoRA (Hu et al. 2021; paper section 3): W u + b + σ scale (B A u + b_B); and DoRA.

b_B is there only where PEFT's lora_bias is on. LoRAs are stored in PEFT's files. In a stack all
factors of a site are in two tensors.

A DoRA (Liu et al. 2024) gives the layer the weight m ⊙ (W + s B A) / ‖W + s B A‖, with the norm of
each output's row. With g = m / ‖W + s B A‖, which is constant, that is g ⊙ (W u) + (g s B) A u, and
with the base's bias b, which it leaves alone:

    (W u + b) ⊙ (1 + σ (g - 1)) + σ ((g s B) A u - (g - 1) ⊙ b)

So experts add up as others do, and one alone is exactly PEFT's. g needs the base's weights, so it
is computed when a DoRA is trained or imported, and stored in a format of our own (docs/format.md).

New ones act at every site. Factors are saved in the base's dtype: exactly the numbers that were
validated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import INIT_STD, Lora
from ..files import JsonObject
from ..sites import Sites, Tensors, is_conv1d
from .adapter_files import PEFT_FILES, ByField, OwnFiles, value_at
from .alone import NewModules
from .module import Modules, SiteModule
from .stack import Constant, Part, Product, factor_of, scaled, stacked
from .sums import weighted_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENDINGS = {"A": ".lora_A.weight", "B": ".lora_B.weight", "bias": ".lora_B.bias"}  # in PEFT's files


@dataclass(frozen=True, repr=False)
class Factors(SiteModule):
    """What LoRAs and DoRAs add at one site: `scale * (B @ A @ u + bias)`."""

    parts: ClassVar[ByField] = {"A": "rn", "B": "dr", "bias": "d"}

    A: Tensor  # [r, n]
    B: Tensor  # [d, r]
    scale: float = 1.0
    bias: Tensor | None = None  # [d]

    def at(self, weight: Tensor) -> Self:
        # Scaled in float32 and rounded once.
        B = (self.scale * self.B.float()).to(weight)
        bias = self.bias
        if bias is not None:
            bias = (self.scale * bias.float()).to(weight)
        return replace(self, A=self.A.to(weight), B=B, scale=1.0, bias=bias)

    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        y: Tensor = base(u)
        if self.bias is not None:
            y = y + strength * self.bias
        h = strength * functional.linear(u, self.A)
        # In one call that rounds once.
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), self.B.t()).view_as(y)


@dataclass(frozen=True, repr=False)
class LoraFactors(Factors):
    """One site's LoRA."""

    kind = "lora"
    files = PEFT_FILES
    endings = ENDINGS

    @classmethod
    def read(cls, directory: Path, config: JsonObject, tensors: Tensors) -> Modules:
        forms = {"A": "rn", "B": "dr"}
        if config.get("lora_bias"):
            forms["bias"] = "d"
        by_site = PEFT_FILES.by_site(directory, tensors, forms, ENDINGS)
        alphas = config.get("alpha_pattern") or {}
        modules = {}
        for site, parts in by_site.items():
            # Of several patterns the first that matches counts, as in PEFT.
            alpha = value_at(alphas, site)
            if alpha is None:
                alpha = config.get("lora_alpha", 8)
            divisor: float = len(parts["A"])
            if config.get("use_rslora"):
                divisor = math.sqrt(divisor)
            modules[site] = LoraFactors(**parts, scale=alpha / divisor)
        return modules

    @classmethod
    def write(cls, folder: Path, modules: Mapping[str, Self], about: Mapping[str, object]) -> Path:
        has_biases = any(lora.bias is not None for lora in modules.values())
        ranks = {}
        alphas = {}
        tensors = {}
        for site, lora in modules.items():
            rank = len(lora.A)
            ranks[site] = rank
            # Without what was lost in dividing by the rank, and an integer where it is one.
            alphas[site] = json.loads(f"{lora.scale * rank:.12g}")
            tensors[site + ENDINGS["A"]] = lora.A
            tensors[site + ENDINGS["B"]] = lora.B
            if has_biases:  # PEFT's lora_bias is for all sites or none
                bias = lora.B.new_zeros(len(lora.B)) if lora.bias is None else lora.bias
                tensors[site + ENDINGS["bias"]] = bias
        usual_rank = mode(ranks.values())
        usual_alpha = mode(alphas.values())
        config = {
            **about,
            "peft_type": "LORA",
            "bias": "none",
            "lora_bias": has_biases,
            "r": usual_rank,
            "lora_alpha": usual_alpha,
            "rank_pattern": _but(usual_rank, ranks),
            "alpha_pattern": _but(usual_alpha, alphas),
            "inference_mode": True,
            "target_modules": sorted(modules),
        }
        return PEFT_FILES.write(folder, config, tensors)


def _but(usual: float, numbers: Mapping[str, float]) -> dict[str, float]:
    return {site: number for site, number in numbers.items() if number != usual}


@dataclass(frozen=True)
class LoraStack(Part):
    """LoRAs. Ranks that differ are filled up with zeros, which changes no number."""

    name = "lora"
    prefix: ClassVar[str | None] = ""
    compared: ClassVar[tuple[str, ...]] = ("A", "B")

    A: Tensor = stacked("rn")
    B: Tensor = stacked("rd")  # transposed, so that both unfold to [E r, ..]; scale folded in
    B_bias: Tensor | None = stacked("d", optional=True)  # scale folded in

    @classmethod
    def row(cls, module: Factors) -> dict[str, Tensor | None]:
        bias = None if module.bias is None else scaled(module.bias, module.scale)
        B = scaled(module.B, module.scale)
        return {"A": module.A, "B": B.T, "B_bias": bias}

    def added(
        self, u: Tensor, y: Tensor, experts: Tensor, weights: Tensor, product: Product
    ) -> Tensor:
        delta = product(u.to(self.A.dtype), experts, weights, self.A, self.B)
        if self.B_bias is None:
            return delta
        return delta + weighted_rows(experts, weights, self.B_bias)

    def constant(self, weights: Tensor) -> Constant:
        used = weights != 0
        A = self.A[used]
        B = self.B[used]
        w = weights[used].float()
        # Factors of weight 1 keep their type, and so their very numbers.
        if (w != 1).any():
            A = A.float()
            B = B.float() * w[:, None, None]
        bias = None
        if self.B_bias is not None:
            bias = (w[:, None] * self.B_bias[used].float()).sum(dim=0)
        A = A.flatten(0, 1)
        B = B.flatten(0, 1).T
        # Ranks that were filled up with zeros go.
        adds = A.any(dim=1) & B.any(dim=0)
        return Constant(A[adds], B[:, adds], bias)


class NewLoras(NewModules[Lora]):
    def initial(
        self, model: PreTrainedModel, settings: Lora, sites: Sites
    ) -> Mapping[str, Tensors]:
        r = settings.rank
        for site in sites.values():
            # Experts were once begun by PEFT, which draws this first: seeds give the same ones.
            torch.empty(r, site.in_features).uniform_()
            torch.empty(site.out_features, r).uniform_()
            torch.empty(r, site.in_features).uniform_()
        factors = {}
        for name, site in sites.items():
            A = torch.empty(r, site.in_features).normal_(std=INIT_STD)
            factors[name] = {"A": A, "B": torch.zeros(site.out_features, r)}
        return factors

    def module(self, settings: Lora, parameters: Tensors, layer: nn.Module) -> Factors:
        scale = settings.alpha / settings.rank  # type: ignore[operator]  # None isn't left there
        return LoraFactors(**parameters, scale=scale)


# DoRA.


@dataclass(frozen=True, repr=False, kw_only=True)
class DoraFactors(Factors):
    """One site's DoRA: outputs ⊙ `output_scale`, plus the factors, whose `scale` is 1."""

    kind = "dora"
    files = OwnFiles("dora_config.json", "dora.safetensors", version_key="dora_version")
    parts: ClassVar[ByField] = {**Factors.parts, "output_scale": "d"}
    endings: ClassVar[ByField] = {"A": ".lora_A", "B": ".lora_B"}

    output_scale: Tensor  # [d]

    @classmethod
    def of(cls, lora: Factors, m: Tensor, layer: Any) -> DoraFactors:
        """PEFT's DoRA of these factors and magnitudes m [d] on the base's linear `layer`."""
        B = lora.scale * lora.B.float()
        # As in PEFT, no gradient passes the norm (section 4.3).
        g = m.float() / row_norms(layer, lora.A, B)
        bias = torch.zeros_like(g) if layer.bias is None else (1 - g) * layer.bias.float()
        return cls(A=lora.A, B=g[:, None] * B, scale=1.0, bias=bias, output_scale=g)

    def at(self, weight: Tensor) -> Self:
        # Not the weight's type: as for (IA)³, around 1 bfloat16 is too coarse.
        scale = self.output_scale.to(weight.device, torch.float32)
        return replace(super().at(weight), output_scale=scale)

    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        def scaled(u: Tensor) -> Tensor:
            y: Tensor = base(u)
            return (y * (1 + strength * (self.output_scale - 1))).to(y.dtype)

        return super().apply(scaled, u, strength)  # type: ignore[arg-type]


@torch.no_grad()
def row_norms(layer: Any, A: Tensor, B: Tensor) -> Tensor:
    """‖W + B A‖ of each output [d], float32, and infinity for 0."""
    W = layer.weight.T if is_conv1d(layer) else layer.weight
    norms = torch.linalg.vector_norm(W.float() + B.float() @ A.float(), dim=1)
    return torch.where(norms > 0, norms, torch.inf)


@dataclass(frozen=True, kw_only=True)
class DoraStack(LoraStack):
    """DoRAs. They aren't compared: without the base, an update's size can't be told."""

    name = "dora"
    prefix = None
    compared = ()

    deltas: Tensor = stacked("d", "float32")

    @classmethod
    def row(cls, module: Any) -> dict[str, Tensor | None]:
        return {**super().row(module), "deltas": module.output_scale.float() - 1}

    def output_factor(self, experts: Tensor, weights: Tensor) -> Tensor:
        return 1 + weighted_rows(experts, weights, self.deltas)

    def constant(self, weights: Tensor) -> Constant:
        return replace(super().constant(weights), output_factor=factor_of(weights, self.deltas))


class NewDoras(NewLoras):
    """Magnitudes m start as the norms of W's rows.

    Unlike PEFT's, they stay float32 under a base of 16 bits, where g = m / ‖W + s B A‖ would have
    steps of 1/128 around 1.
    """

    exact = ("m",)
    on_packed = False  # what we store of W's norms would be those of other weights

    def initial(
        self, model: PreTrainedModel, settings: Lora, sites: Sites
    ) -> Mapping[str, Tensors]:
        initial = {}
        for site, parameters in super().initial(model, settings, sites).items():
            norms = row_norms(model.get_submodule(site), **parameters)
            initial[site] = {**parameters, "m": torch.where(norms.isinf(), 0, norms)}
        return initial

    def module(self, settings: Lora, parameters: Tensors, layer: nn.Module) -> DoraFactors:
        factors = dict(parameters)
        m = factors.pop("m")
        return DoraFactors.of(super().module(settings, factors, layer), m, layer)
