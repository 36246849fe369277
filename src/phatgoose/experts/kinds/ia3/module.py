"""(IA)³ (Liu et al. 2022): a vector l that scales a layer's output or its input.

    (W u + b) ⊙ (1 + σ (l - 1)), or with the input scaled W (u ⊙ (1 + σ (l - 1))) + b

Stored in PEFT's files (`peft`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ....errors import ExpertError
from ..kind import AdapterFiles, SiteModule, are_floats
from ..peft import ADAPTER_WEIGHTS, PEFT_FILES, site_of, write_adapter

IA3_ENDING = ".ia3_l"


@dataclass(frozen=True, repr=False)
class ScalingVector(SiteModule):
    """One site's (IA)³ vector l: it scales the input or the output of the linear layer."""

    kind: ClassVar[str] = "ia3"
    files: ClassVar[AdapterFiles] = PEFT_FILES

    vector: Tensor  # [n] or [d]
    on_input: bool

    @property
    def in_features(self) -> int | None:
        return len(self.vector) if self.on_input else None

    @property
    def out_features(self) -> int | None:
        return None if self.on_input else len(self.vector)

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
        cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> dict[str, ScalingVector]:
        vectors = {}
        for key, tensor in sorted(tensors.items()):
            site = site_of(key, (IA3_ENDING,), directory)
            if tensor.dim() != 2 or sorted(tensor.shape)[0] != 1 or not are_floats(tensor):
                raise ExpertError(
                    f"{directory}, site {site}: wanted a vector of shape (d, 1) or (1, n), in "
                    f"floating point, got {tuple(tensor.shape)} of {tensor.dtype}."
                )
            # PEFT has vectors of outputs as [d, 1] and those of inputs as [1, n].
            vectors[site] = ScalingVector(tensor.flatten(), on_input=tensor.shape[0] == 1)
        if not vectors:
            raise ExpertError(f"{directory}: {ADAPTER_WEIGHTS} holds no (IA)³ vectors.")
        return vectors

    @classmethod
    def write(
        cls, folder: Path, modules: Mapping[str, ScalingVector], about: Mapping[str, Any]
    ) -> Path:
        config = {
            **about,
            "peft_type": "IA3",
            "feedforward_modules": sorted(site for site, each in modules.items() if each.on_input),
        }
        tensors = {
            site + IA3_ENDING: each.vector.view((1, -1) if each.on_input else (-1, 1))
            for site, each in modules.items()
        }
        return write_adapter(folder, config, modules, tensors)
