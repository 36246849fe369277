"""What is trained on a base: an expert's new modules, and gates, one vector per module.

Glossary: u input activation of a site [.., n], v the gate [n]. The gate sees u whatever kind of
module the expert has at the site, so that all gates of a site can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base import Base
from ..config import Peft
from ..errors import ConfigError
from ..experts.kind import FreshExpert, ModifiedLinear, SiteModule, new_gate, openness
from ..experts.registry import kind_for
from ..sites import Site, find_sites


def placed_sites(model: PreTrainedModel, peft: Peft) -> dict[str, Site]:
    """The sites of `model` at which a new expert with these settings acts, by name.

    Raises ConfigError when there are none, or none are known for such a model and `sites` is None.
    """
    pattern = peft.sites
    if pattern is not None:
        return find_sites(model, pattern)
    pattern = kind_for(peft).new_modules.default_sites(model, peft)
    try:
        return find_sites(model, pattern)
    except ConfigError as error:
        if pattern is None:
            raise
        raise ConfigError(
            f"Where to place it in {type(model).__name__} isn't known; name the layers with sites."
        ) from error


def parameters_at(model: PreTrainedModel, peft: Peft) -> int:
    """The number of trained parameters of a new expert, without gates.

    Raises as `placed_sites` and `check_packed`.
    """
    check_packed(peft, packed=getattr(model, "is_quantized", False))
    return kind_for(peft).new_modules.count(model, peft, placed_sites(model, peft).values())


def check_packed(peft: Peft, *, packed: bool) -> None:
    """Raise ConfigError where such an expert can't be trained on weights that are `packed`."""
    kind = kind_for(peft)
    if packed and not kind.new_modules.on_packed:
        raise ConfigError(
            f"{kind.title} is trained on the base's own weights, not on quantised ones: leave out "
            f"--dtype 4bit, or train a lora."
        )


def fresh_expert(base: Base, peft: Peft, *, joint: bool) -> AbstractContextManager[FreshExpert]:
    """`base` with a new expert on it while the context is open; `joint`: behind gates."""
    return kind_for(peft).new_modules.create(
        base, peft, placed_sites(base.model, peft), joint=joint
    )


class GatedLinear(ModifiedLinear):
    """A linear layer with one expert's module behind a gate v, which starts at zeros.

    A LoRA's output is `W u + scale * B A u * sigmoid(v . u)`, without a bias in the sigmoid (paper
    section 3). A module of another kind acts at the strength of the sigmoid (`experts.kind`).
    """

    def __init__(
        self, base: nn.Module, module: SiteModule, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(base, module, dtype)
        self.gate = new_gate(self.in_features, self.weight.device)

    def strength(self, u: Tensor) -> Tensor:
        return openness(u, self.gate)

    def vector(self) -> Tensor:
        """The gate v, on the CPU."""
        return self.gate.detach().cpu()


# Joint gates (paper Appendix A): part of the new module at their site, which acts at the strength
# sigmoid(v . u), as it does behind a gate trained later.


def take_gates(owners: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The trained gates, by site, of modules that hold one as `gate`; they lose it."""
    gates = {}
    for site, owner in owners.items():
        gate: Tensor = owner.gate  # type: ignore[assignment]
        gates[site] = gate.detach().cpu()
        del owner.gate  # PEFT would save it with its layer
    return gates
