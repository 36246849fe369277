"""New experts of every kind: the sites and the number of their modules, and the modules."""

from __future__ import annotations

from contextlib import AbstractContextManager

from transformers import PreTrainedModel

from ..base.loading import Base
from ..base.sites import Site, find_sites
from ..config import Peft
from ..errors import ConfigError
from ..experts.kinds.kind import FreshExpert
from ..experts.kinds.registry import kind_for


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
    """The number of trained parameters of a new expert on `model`, without gates.

    Raises ConfigError as `placed_sites` does.
    """
    return kind_for(peft).new_modules.count(model, peft, placed_sites(model, peft).values())


def fresh_expert(base: Base, peft: Peft, *, joint: bool) -> AbstractContextManager[FreshExpert]:
    """`base` with a new expert on it while the context is open.

    `joint` puts a gate before each module. Raises ConfigError as `placed_sites` does.
    """
    return kind_for(peft).new_modules.create(
        base, peft, placed_sites(base.model, peft), joint=joint
    )
