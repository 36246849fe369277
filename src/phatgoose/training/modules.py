"""What is trained on a base: an expert's new modules, and gates, one vector per module.

Glossary: u input activation of a site [.., n], v the gate [n]. The gate sees u whatever kind of
module the expert has at the site, so that all gates of a site can be compared.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base import Base
from ..config import Peft
from ..errors import ConfigError
from ..experts import kind_for
from ..experts.kind import FreshExpert, ModifiedLinear, SiteModule, new_gate, openness
from ..sites import Site, find_sites


def placed_sites(model: PreTrainedModel, peft: Peft) -> dict[str, Site]:
    """The sites of `model` at which a new expert with these settings acts, by name.

    Raises ConfigError when there are none, or none are known for such a model and `sites` is None,
    or when such an expert can't be trained on the model's quantised weights.
    """
    kind = kind_for(peft)
    if getattr(model, "is_quantized", False) and not kind.new_modules.on_packed:
        raise ConfigError(
            f"{kind.label} is trained on the base's own weights, not on quantised ones: leave out "
            f"--dtype 4bit, or train a lora."
        )
    return find_sites(model, peft.sites or kind.new_modules.default_sites(model, peft))


def fresh_expert(base: Base, peft: Peft, *, joint: bool) -> AbstractContextManager[FreshExpert]:
    """`base` with a new expert on it while the context is open; `joint`: behind gates."""
    return kind_for(peft).new_modules.create(
        base, peft, placed_sites(base.model, peft), joint=joint
    )


class GatedLinear(ModifiedLinear):
    """A linear layer with one expert's module behind a gate v, which starts at zeros.

    A LoRA's output is `W u + scale * B A u * sigmoid(v . u)`, without a bias in the sigmoid (paper
    section 3). A module of another kind acts at the strength of the sigmoid (`experts.kinds`).
    """

    def __init__(
        self, base: nn.Module, module: SiteModule, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(base, module, dtype)
        self.gate = new_gate(self.in_features, self.weight.device)

    def strength(self, u: Tensor) -> Tensor:
        return openness(u, self.gate)
