"""New experts of every kind: the sites and the number of their modules, and the modules."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from ...base.loading import Base
from ...base.sites import Site, find_sites
from ...config import Peft
from ...errors import ConfigError
from ...experts.adapter import kind_for
from .bottleneck import OUTPUTS, count_bottleneck, new_bottleneck
from .fresh import FreshExpert, NewModules
from .ia3 import count_ia3, ia3_sites, new_ia3
from .lora import count_lora, new_lora

__all__ = ["NEW_MODULES", "fresh_expert", "modules_for", "parameters_at", "placed_sites"]

# By the names of `experts.adapter.KINDS`; a new kind is added here.
NEW_MODULES: dict[str, NewModules] = {
    "lora": NewModules(lambda model, lora: None, count_lora, new_lora),
    "ia3": NewModules(ia3_sites, count_ia3, new_ia3, torch.float32),
    "bottleneck": NewModules(
        lambda model, shape: OUTPUTS[shape.placement], count_bottleneck, new_bottleneck
    ),
}


def modules_for(peft: Peft) -> NewModules:
    """How new modules with these settings are made."""
    return NEW_MODULES[kind_for(peft).name]


def placed_sites(model: PreTrainedModel, peft: Peft) -> dict[str, Site]:
    """The sites of `model` at which a new expert with these settings acts, by name.

    Raises ConfigError when there are none, or none are known for such a model and `sites` is None.
    """
    pattern = peft.sites
    if pattern is not None:
        return find_sites(model, pattern)
    pattern = modules_for(peft).default_sites(model, peft)
    try:
        return find_sites(model, pattern)
    except ConfigError as error:
        if pattern is None:
            raise
        raise ConfigError(
            f"Where to place it in {type(model).__name__} isn't known; name the layers with sites."
        ) from error


def parameters_at(model: PreTrainedModel, peft: Peft) -> int:
    """The number of trained parameters of a new expert on `model`, without gates.

    Raises ConfigError as `placed_sites` does.
    """
    return modules_for(peft).count(model, peft, placed_sites(model, peft).values())


def fresh_expert(base: Base, peft: Peft, *, joint: bool) -> AbstractContextManager[FreshExpert]:
    """`base` with a new expert on it while the context is open.

    `joint` puts a gate before each module. Raises ConfigError as `placed_sites` does.
    """
    return modules_for(peft).create(base, peft, placed_sites(base.model, peft), joint=joint)
