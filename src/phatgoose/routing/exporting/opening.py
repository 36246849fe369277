"""Opening a model to export it: as it always is, but with every expert's factors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from ...config import Routing
from ...errors import RoutingError
from ...experts.pool import Pool
from ..compose import install, prepare, routed_layers
from ..open_model import is_pool, is_routed, loaded_base, open_model
from ..routers.scores import Scores

__all__ = ["open_routed"]


def open_routed(
    place: str | Path,
    base: str | None = None,
    *,
    dtype: str = "auto",
    routing: Routing | None = None,
    keep: Iterable[str] | None = None,
    leave_out: Iterable[str] | None = None,
    scores: Scores | str | Path | None = None,
) -> PreTrainedModel:
    """The routed model, or the pool composed by `routing`, at `place`; the rest as `open_model`.

    In a pool under router merged nothing is folded into weights, from which factors can't be had
    back exactly. Raises RoutingError for a base model alone, and what `open_model` does.
    """
    if is_routed(place):
        opened = open_model(
            place,
            base,
            dtype=dtype,
            routing=routing,
            keep=keep,
            leave_out=leave_out,
            scores=scores,
        )
        return opened.model
    if not is_pool(place):
        raise RoutingError(f"{place} is neither a routed model nor a pool; there is no routing.")
    pool = Pool.open(place).select(keep, leave_out)
    prepared = prepare(pool, loaded_base(pool, base, dtype), routing, scores=scores)
    prepared.parts.router.folds = False
    prepared.parts.layers = {layer.site.name: layer for layer in routed_layers(prepared)}
    return install(prepared.model, prepared.parts)
