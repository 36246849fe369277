"""(IA)³ (Liu et al. 2022): a vector l that scales a layer's output or its input.

    (W u + b) ⊙ (1 + σ (l - 1)), or with the input scaled W (u ⊙ (1 + σ (l - 1))) + b

Stored in PEFT's files. In a stack are those that scale a site's input, and those that scale its
output.

New ones act where PEFT puts them in models of the base's type: by default on keys, values, and the
input of the feed-forward network's last linear layer (Liu et al. 2022). Vectors stay float32, in
use and on disk: bfloat16 has steps of 1/128 around 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as IA3_FEEDFORWARD,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_MODULES
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import IA3
from ..errors import ExpertError
from ..files import JsonObject
from ..sites import Sites, Tensors
from .adapter_files import PEFT_FILES, ByField
from .alone import NewModules
from .module import SiteModule
from .stack import Constant, Part, factor_of, stacked
from .sums import weighted_rows

ENDINGS = {"vector": ".ia3_l"}  # in PEFT's files


@dataclass(frozen=True, repr=False)
class ScalingVector(SiteModule):
    """One site's (IA)³ vector l: it scales the input or the output of the linear layer."""

    kind = "ia3"
    files = PEFT_FILES
    parts: ClassVar[ByField] = {"vector": "dn"}  # as PEFT has it
    endings = ENDINGS

    vector: Tensor  # [n] or [d]
    on_input: bool

    @property
    def sizes(self) -> Mapping[str, int]:
        return {"n" if self.on_input else "d": len(self.vector)}

    def at(self, weight: Tensor) -> ScalingVector:
        # Not the weight's type: around 1 bfloat16 has steps of 1/128, about as far as vectors move.
        return ScalingVector(self.vector.to(weight.device, torch.float32), self.on_input)

    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        factor = 1 + strength * (self.vector - 1)
        if self.on_input:
            scaled: Tensor = base((u * factor).to(u.dtype))
            return scaled
        y: Tensor = base(u)
        return (y * factor).to(y.dtype)

    @classmethod
    def read(
        cls, directory: Path, config: JsonObject, tensors: Tensors
    ) -> dict[str, ScalingVector]:
        vectors = {}
        by_site = PEFT_FILES.by_site(directory, tensors, cls.parts, ENDINGS)
        for site, parts in by_site.items():
            vector = parts["vector"]
            d, n = vector.shape
            if 1 not in (d, n):
                raise ExpertError(f"{directory}, site {site}: got a matrix {(d, n)}, not a vector.")
            # PEFT has vectors of outputs as [d, 1] and those of inputs as [1, n].
            vectors[site] = ScalingVector(vector.flatten(), on_input=d == 1)
        return vectors

    @classmethod
    def write(cls, folder: Path, modules: Mapping[str, Self], about: Mapping[str, object]) -> Path:
        of_inputs = []
        tensors = {}
        for site, module in sorted(modules.items()):
            shape = (-1, 1)
            if module.on_input:
                of_inputs.append(site)
                shape = (1, -1)
            tensors[site + ENDINGS["vector"]] = module.vector.view(shape)
        config = {
            **about,
            "peft_type": "IA3",
            "feedforward_modules": of_inputs,
            "inference_mode": True,
            "target_modules": sorted(modules),
        }
        return PEFT_FILES.write(folder, config, tensors)


@dataclass(frozen=True)
class ScalingStack(Part):
    """(IA)³ vectors of outputs as what they differ from 1 by, l - 1, in float32."""

    name = "output"
    on_input: ClassVar[bool] = False
    compared = ("deltas",)

    deltas: Tensor = stacked("d", "float32")

    @classmethod
    def stacks(cls, module: ScalingVector) -> bool:
        return module.on_input == cls.on_input

    @classmethod
    def row(cls, module: ScalingVector) -> Tensors:
        return {"deltas": module.vector.float() - 1}

    def output_factor(self, experts: Tensor, weights: Tensor) -> Tensor | None:
        return 1 + weighted_rows(experts, weights, self.deltas)

    def constant(self, weights: Tensor) -> Constant:
        return Constant(output_factor=factor_of(weights, self.deltas))


@dataclass(frozen=True)
class InputScalingStack(ScalingStack):
    """Those of inputs."""

    name = "input"
    on_input = True

    deltas: Tensor = stacked("n", "float32")

    input_factor = ScalingStack.output_factor
    output_factor = Part.output_factor

    def constant(self, weights: Tensor) -> Constant:
        return Constant(input_factor=factor_of(weights, self.deltas))


class NewScalings(NewModules[IA3]):
    """A vector is called "input" or "output", by what it scales."""

    exact = ("input", "output")

    def default_sites(self, model: PreTrainedModel, settings: IA3) -> str:
        return _endings(IA3_MODULES.get(model.config.model_type, []))

    def initial(self, model: PreTrainedModel, settings: IA3, sites: Sites) -> Mapping[str, Tensors]:
        inputs = scales_input(model, sites)
        vectors = {}
        for name, site in sites.items():
            if name in inputs:
                vectors[name] = {"input": torch.ones(site.in_features)}
            else:
                vectors[name] = {"output": torch.ones(site.out_features)}
        return vectors

    def module(self, settings: IA3, parameters: Tensors, layer: nn.Module) -> ScalingVector:
        ((scales, vector),) = parameters.items()
        return ScalingVector(vector, on_input=scales == "input")


def scales_input(model: PreTrainedModel, sites: Iterable[str]) -> set[str]:
    """Those of `sites` whose input is scaled; none in a model whose type PEFT doesn't list."""
    pattern = _endings(IA3_FEEDFORWARD.get(model.config.model_type, []))
    return {site for site in sites if re.search(pattern, site)}


def _endings(names: list[str]) -> str:
    if not names:
        return r"(?!)"  # matches nothing
    return rf"(^|\.)({'|'.join(map(re.escape, names))})$"
