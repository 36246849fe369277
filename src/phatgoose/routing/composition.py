"""What a routed model is made of, as it is found on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.fingerprint import BaseReference, Mark
from ..base.sites import ROUTED
from ..config import Routing
from ..errors import RoutingError
from ..tasks.task import Example
from .layers import RoutedLayer, RoutedLinear
from .routers.router import Lookup, Router, router_of


@dataclass
class Composition:
    """What a routed model is made of; found on it as `model.phatgoose`.

    `experts` are the pool's names in order, `records` their places and hashes; `layers` the routed
    layers by site; `lookup` what the sites of a looked-up router share, None for other routers;
    `marks` tell whether the base was changed since it was routed, `differs` whether it was before.
    """

    base: BaseReference
    tokenizer: PreTrainedTokenizerBase | None
    experts: tuple[str, ...]
    records: list[dict[str, Any]]
    routing: Routing
    layers: dict[str, RoutedLayer] = field(default_factory=dict)
    lookup: Lookup | None = None
    marks: dict[str, Mark] = field(default_factory=dict)
    differs: bool = False

    def __repr__(self) -> str:
        """The router, the base, and how many experts."""
        what = f"{self.routing.router} on {self.base.id!r}"
        return f"<Composition by {what} (experts: {len(self.experts)})>"

    @cached_property
    def router(self) -> Router:
        """The router that `routing` asks for."""
        return router_of(self.routing)


def composition_if_any(model: PreTrainedModel) -> Composition | None:
    """What `model` was composed of, None when it is not routed."""
    parts = getattr(model, ROUTED, None)
    return parts if isinstance(parts, Composition) else None


def composition_of(model: PreTrainedModel) -> Composition:
    """What `model` was composed of. Raises RoutingError when it is not routed."""
    parts = composition_if_any(model)
    if parts is None:
        raise RoutingError("This model is not routed; make one with compose(pool).")
    return parts


@contextmanager
def announcing(
    model: PreTrainedModel,
    task: str,
    prompts: Sequence[Sequence[int]],
    examples: Sequence[Example] | None = None,
) -> Iterator[Callable[[Sequence[int]], None]]:
    """A function to call before each pass through `model` with the rows' indices in `prompts`.

    Routers that choose for whole inputs need it: those that read inputs go by `prompts`, given by
    the tokens that the model reads (retrieval in the paper's form by `examples`), oracle by the
    name `task`; random ones start anew.
    Other models, routed or not, run as usual. Raises RoutingError when router oracle has no score
    of `task`.
    """
    parts = composition_if_any(model)
    lookup = parts.lookup if parts else None
    for layer in parts.layers.values() if parts else ():
        if isinstance(layer, RoutedLinear):
            layer.router.restart()
    if lookup is None:
        yield lambda _: None
        return
    lookup.begin_task(task)
    found = lookup.find(prompts, examples)
    try:
        yield lambda rows: lookup.serve(found.of(rows))
    finally:
        lookup.serve(None)
