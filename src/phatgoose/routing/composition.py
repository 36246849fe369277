"""What a routed model is made of, as it is found on the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.fingerprint import BaseReference
from ..base.sites import ROUTED
from ..config import Routing
from ..errors import RoutingError
from .layers import RoutedLayer
from .routers.per_input.lookup import Lookup

__all__ = ["Composition", "composition_of"]


@dataclass
class Composition:
    """What a routed model is made of; found on it as `model.phatgoose`.

    `experts` are the pool's names in order, `records` their places and hashes; `layers` the routed
    layers by site; `lookup` what the sites of a looked-up router share, None for other routers.
    """

    base: BaseReference
    tokenizer: PreTrainedTokenizerBase | None
    experts: tuple[str, ...]
    records: list[dict[str, Any]]
    routing: Routing
    layers: dict[str, RoutedLayer]
    lookup: Lookup | None = None


def composition_of(model: PreTrainedModel) -> Composition:
    """What `model` was composed of. Raises RoutingError when it is not routed."""
    parts = getattr(model, ROUTED, None)
    if not isinstance(parts, Composition):
        raise RoutingError("This model is not routed; make one with compose(pool).")
    return parts
