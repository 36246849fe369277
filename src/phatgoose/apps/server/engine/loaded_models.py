"""The models that are served: each by its name, and rerouted as requests ask.

All routings over one base share its weights, and those of the same experts their stacked factors.
A request's own routing is composed when it is first asked for and kept for the next ones; of those
that nobody uses, the one used longest ago makes room.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from ....base.fingerprint import BaseReference
from ....base.loading import Base, choose_dtype, load_base, twin
from ....base.sites import ROUTED
from ....config import Routing
from ....errors import BaseModelError, ConfigError, RoutingError
from ....experts.pool import Pool
from ....routing.composition import Composition, composition_of
from ....routing.layers import ChoosingLayer
from ....routing.open_model import compose_pool, is_pool, is_routed
from ....routing.routers.registry import USE_K
from ....routing.saved.description import HASHES
from ....routing.saved.load import base_of, load
from ....tasks.embeddings import without_downloads
from ..api_errors import busy
from ..settings import ServedModel
from .model_runner import ModelRunner

__all__ = ["LoadedModel", "LoadedModels", "ModelUse", "RoutingOverride"]

BY_TASK = "oracle"  # goes by the name of a task, which a request doesn't have


@dataclass(frozen=True)
class RoutingOverride:
    """What a request changes of the model it names; None leaves a thing as it is served."""

    router: str | None = None
    k: int | None = None
    keep: tuple[str, ...] | None = None
    leave_out: tuple[str, ...] | None = None


class Bases:
    """Base models, each loaded once."""

    def __init__(self) -> None:
        self._loaded: list[tuple[Base, str]] = []

    def get(self, wanted: BaseReference, dtype: str) -> Base:
        """The base `wanted` in `dtype`, loaded if it is not there by name or by fingerprint."""
        dtype = str(choose_dtype(dtype)).removeprefix("torch.")
        for base, of in self._loaded:
            named = (base.id, base.revision) == (wanted.id, wanted.revision)
            if of == dtype and (named or base.fingerprint == wanted.fingerprint):
                return base
        base = load_base(wanted.id, dtype=dtype, revision=wanted.revision)
        self._loaded.append((base, dtype))
        return base


class LoadedModel:
    """A model as it is served by name, and what it takes to reroute it."""

    def __init__(self, settings: ServedModel, bases: Bases) -> None:
        """Open it. Raises what opening does, ConfigError for settings it can't have."""
        self.settings = settings
        self._check()
        place = settings.place
        named = BaseReference(settings.base) if settings.base else None
        if is_routed(place):
            self.base = bases.get(named or base_of(place), settings.dtype)
            model = load(place, twin(self.base), retrieval_embedder=self._embedder)
            self.parts: Composition | None = composition_of(model)
            self.routing = self.parts.routing
        elif is_pool(place):
            self.base = bases.get(named or self.pool.base, settings.dtype)
            self.routing = settings.routing or Routing()
            model = self.compose(self.pool, self.routing)
            self.parts = composition_of(model)
        else:
            self.base = bases.get(named or BaseReference(place), settings.dtype)
            self.routing, self.parts = Routing(), None
            model = twin(self.base).model
        if getattr(model, "_is_stateful", False):
            raise BaseModelError(
                f"{self.base.id!r} remembers more of a text than keys and values; such a model "
                f"can't answer several requests at once and isn't served."
            )
        self.runner = ModelRunner(model, self.base.tokenizer)

    def _check(self) -> None:
        settings = self.settings
        named = (
            Routing(retrieval_embedder=self._embedder) if self._embedder else None
        )  # what any may have
        routing = None if settings.routing == named else settings.routing
        given = routing or settings.keep or settings.leave_out or settings.scores
        if given and not is_pool(settings.place):
            raise ConfigError(
                f"{settings.place} is no pool: a routed model was made with its own router and "
                f"experts, and a base alone has none. Serve the pool to choose them."
            )
        if settings.routing and settings.routing.router == BY_TASK:
            raise ConfigError(f"Router {BY_TASK} goes by a task's name, which no request tells.")

    @property
    def _embedder(self) -> str | None:
        return self.settings.routing.retrieval_embedder if self.settings.routing else None

    @cached_property
    def pool(self) -> Pool:
        """The model's experts, opened. Raises RoutingError for a saved model's, unless found."""
        if is_routed(self.settings.place):
            raise RoutingError(
                f"{self.settings.name!r} is a saved model, which can be rerouted only while a pool "
                f"with its experts, as they were when it was saved, is served beside it."
            )
        opened = Pool.open(self.settings.place)
        return opened.select(self.settings.keep, self.settings.leave_out)

    def find_experts(self, pools: Iterable[Pool]) -> None:
        """Let a saved model be rerouted with its experts from the first of `pools` that has them.

        Where its own file says that they are is no place that the operator named: nothing there is
        opened, and nothing fetched.
        """
        if self.parts is None or not is_routed(self.settings.place):
            return
        wanted = [_identity(record) for record in self.parts.records]
        for pool in pools:
            identities = map(_identity, pool.records())
            held = dict(zip(identities, pool.experts, strict=True))
            if all(identity in held for identity in wanted):
                self.pool = Pool(tuple(held[identity] for identity in wanted))
                return

    def compose(self, pool: Pool, routing: Routing) -> PreTrainedModel:
        """`pool` over the base, sharing its weights."""
        scores = self.settings.scores
        return compose_pool(pool, twin(self.base), routing=routing, scores=scores)

    def rerouted(self, wish: RoutingOverride) -> tuple[Routing, Pool]:
        """The routing and the experts that `wish` makes of the served ones.

        What changes nothing is left out: a k greater than the pool, a k where all experts act.
        Raises RoutingError for a model without experts and a router that needs more than a request
        tells, PoolError for unknown experts.
        """
        if self.parts is None:
            raise RoutingError(f"{self.settings.name!r} is a base model alone; it has no experts.")
        if wish.router == BY_TASK:
            raise RoutingError(f"Router {BY_TASK} goes by a task's name, which no request tells.")
        pool = self.pool.select(wish.keep, wish.leave_out)
        routing = self.routing
        if wish.router is not None and wish.router != routing.router:
            routing = replace(routing, router=wish.router, expert=None)
        k = min(wish.k or routing.k, len(pool)) if routing.router in USE_K else self.routing.k
        return replace(routing, k=k), pool


def _identity(record: Mapping[str, Any]) -> tuple[object, ...]:
    """What two records of one expert have in common, wherever its files are."""
    return tuple(record.get(key) for key in ("name", *HASHES))


@dataclass
class ModelUse:
    """A model in use by a number of requests."""

    runner: ModelRunner
    requests: int = 0


Key = tuple[str, Routing, tuple[str, ...]]


class LoadedModels:
    """All that is served. `acquire` and `release` may be called from any thread."""

    def __init__(self, served: Sequence[ServedModel], most_rerouted: int) -> None:
        """Open every model. Raises what opening does."""
        bases = Bases()
        self._most = most_rerouted
        self._lock = threading.Lock()
        self._composing = threading.Lock()  # one at a time: it takes all cores anyway
        self._rerouted: OrderedDict[Key, ModelUse] = OrderedDict()
        self._served: dict[str, LoadedModel] = {}
        for settings in served:
            self._served[settings.name] = LoadedModel(settings, bases)
            self._share_factors(self._served[settings.name].runner.model)
        pools = [each.pool for each in self if is_pool(each.settings.place)]
        for each in self:
            each.find_experts(pools)

    def __iter__(self) -> Iterator[LoadedModel]:
        return iter(self._served.values())

    def get(self, name: str) -> LoadedModel | None:
        """The model called `name`, None if there is none."""
        return self._served.get(name)

    def ready(self, served: LoadedModel, wish: RoutingOverride) -> ModelUse | None:
        """The model as `wish` has it if it is there, kept at least until its `release`; else None.

        Takes its time where `wish` is one, since a pool may have to be opened. Raises
        PhatgooseError for what can't be had.
        """
        if wish == RoutingOverride():
            return ModelUse(served.runner)
        routing, pool = served.rerouted(wish)
        names = served.parts.experts if served.parts is not None else ()
        if (routing, pool.names) == (served.routing, names):
            return ModelUse(served.runner)
        return self._take((served.settings.name, routing, pool.names))

    def acquire(self, served: LoadedModel, wish: RoutingOverride) -> ModelUse:
        """The model as `wish` has it, composed if need be, kept at least until its `release`.

        Raises PhatgooseError for what can't be had, ApiError when too many routings are in use.
        """
        with self._composing:
            if (ready := self.ready(served, wish)) is not None:
                return ready
            routing, pool = served.rerouted(wish)
            key = (served.settings.name, routing, pool.names)
            self._make_room()
            with without_downloads():  # a client must not make others wait for the network
                model = served.compose(pool, routing)
            self._share_factors(model)
            use = ModelUse(ModelRunner(model, served.base.tokenizer), 1)
            with self._lock:
                self._rerouted[key] = use
        return use

    def keep(self, use: ModelUse) -> None:
        """Tell that one more request needs what `acquire` gave another, until its `release`."""
        with self._lock:
            use.requests += 1

    def release(self, use: ModelUse) -> None:
        """Tell that a request is done with what `acquire` gave it."""
        with self._lock:
            use.requests -= 1

    def _take(self, key: Key) -> ModelUse | None:
        with self._lock:
            use = self._rerouted.get(key)
            if use is not None:
                use.requests += 1
                self._rerouted.move_to_end(key)
            return use

    def _make_room(self) -> None:
        with self._lock:
            idle = [key for key, use in self._rerouted.items() if use.requests == 0]
            if len(self._rerouted) < self._most:
                return
            if not idle:
                raise busy("Too many different routings are in use; try again in a while.", 5)
            del self._rerouted[idle[0]]

    def _share_factors(self, model: PreTrainedModel) -> None:
        """Let `model` use the stacked factors of a model of the same experts, if there is one."""
        parts = getattr(model, ROUTED, None)
        with self._lock:
            runners = [*(s.runner for s in self), *(use.runner for use in self._rerouted.values())]
        for other in (getattr(runner.model, ROUTED, None) for runner in runners):
            if parts is None or other is None or other is parts or other.records != parts.records:
                continue
            for name, layer in parts.layers.items():
                twin_layer = other.layers[name]
                if not isinstance(layer, ChoosingLayer) or type(layer) is not type(twin_layer):
                    continue
                if layer.stack.dtype == twin_layer.stack.dtype:
                    for tensor in layer.stack.tensors():
                        setattr(layer, tensor, getattr(twin_layer, tensor))
