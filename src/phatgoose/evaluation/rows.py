"""The rows of a comparison: the base, every router of the registry (paper section 4.2), others."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..base import Base, BaseReference, dtype_name, load_base
from ..config import Routing, closest
from ..errors import ConfigError, PoolError
from ..experts.expert import Expert
from ..experts.pool import Pool
from ..files import sha256_of, shortened
from ..jobs import absolute
from ..routing.compose import OpenedModel, compose, detach, is_pool, is_routed, open_model
from ..routing.routers.registry import all_routers, canonical, router_of
from ..routing.saved import ROUTED_INFO, base_of
from ..sites import ROUTED
from .results import BASE

# In the order of the tables. A single expert is no method: Oracle and Best Individual choose one.
ROUTERS = all_routers()
METHODS = {
    BASE: "Base model",
    **{name: kind.label for name, kind in ROUTERS.items() if name not in ("single", "weights")},
}
# These follow from the single experts' results, which they know: they are not zero-shot.
DERIVED = tuple(name for name, kind in ROUTERS.items() if "scores" in kind.given)
# These need a file of the task's, so they are run by name only.
WITH_EXAMPLES = {name for name, kind in ROUTERS.items() if "examples" in kind.given}
EVERY = "all"  # stands for every method whose needs the pool meets


def label_of(router: str) -> str:
    """A router, with or without settings, in tables: "Arrow, form = peft"."""
    name, _, settings = router.partition(":")
    pairs = [each.partition("=") for each in settings.split(",")] if settings else []
    parts = [f"{key.replace('_', ' ')} = {value}" for key, _, value in pairs]
    label = ROUTERS[name].label if name in ROUTERS else METHODS.get(name, name)
    return ", ".join([label, *parts])


def runnable_methods(
    pool: Pool, methods: Iterable[str] | str, routing: Routing
) -> tuple[list[str], list[str]]:
    """(names of the methods to run, notes on those of "all" that were left out).

    Raises ConfigError for an unknown name or settings that a named one can't have, and PoolError if
    `pool` lacks what a named one needs.
    """
    asked = [methods] if isinstance(methods, str) else list(methods) or [""]
    named = [_canonical(name) for name in asked if name != EVERY]
    for name in named:
        _check_method(name, pool, routing)
    every, notes = [], []
    for name in METHODS if EVERY in asked else ():
        if name in WITH_EXAMPLES:
            continue
        try:
            _check_method(name, pool, routing)
            every.append(name)
        except (ConfigError, PoolError) as error:
            notes.append(f"{METHODS[name]} was left out: {error}")
    return list(dict.fromkeys([*every, *named])), notes


def _canonical(method: str) -> str:
    if method.partition(":")[0] not in METHODS:
        raise ConfigError(
            f"Method {shortened(method)} is unknown; known are {EVERY}, {', '.join(METHODS)}."
            f"{closest(method.partition(':')[0], METHODS)}"
        )
    return method if method == BASE else canonical(method)


def _check_method(name: str, pool: Pool, routing: Routing) -> None:
    if name not in (BASE, *DERIVED):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # composing warns
            router_of(replace(routing, router=name)).check(pool)


@dataclass(frozen=True)
class Row:
    """One model of a comparison; `identity` differs from that of any other model.

    Experts of `pool`, by `routing`; else the model at `place`, or the base alone if that is None
    too. In another process the `place` of a pool is those of its experts.
    """

    name: str
    label: str
    identity: Mapping[str, Any]
    pool: Pool | None = None
    routing: Routing | None = None
    place: str | tuple[str, ...] | None = None

    @property
    def base(self) -> BaseReference | None:
        if self.pool is not None:
            return self.pool.base
        return (
            base_of(self.place) if isinstance(self.place, str) and is_routed(self.place) else None
        )

    def portable(self) -> Row:
        if self.pool is None:
            return (
                replace(self, place=absolute(self.place)) if isinstance(self.place, str) else self
            )
        places = tuple(record["path"] for record in self.pool.records())
        return replace(self, pool=None, place=places)

    @contextmanager
    def model(self, base: Base) -> Iterator[OpenedModel]:
        """The row's model; afterwards the base is as it was.

        Raises PoolError when the experts there are not those that the row was made of.
        """
        opened, pool = OpenedModel(base.model, base.tokenizer), self.pool
        if isinstance(self.place, str):
            dtype = dtype_name(base.model.dtype)
            opened = open_model(self.place, base, dtype=dtype, routing=self.routing)
        elif self.place:
            pool = Pool.open(self.place)
            if pool_row(self.name, self.label, pool, self.routing).identity != self.identity:
                raise PoolError(
                    f"{self.label}: the experts that this worker has at {self.place[0]} and the "
                    f"other places are not those that the comparison was begun with."
                )
        if pool is not None:
            compose(pool, base, routing=self.routing)
        try:
            yield opened
        finally:
            if hasattr(opened.model, ROUTED):
                detach(opened.model)


def rows_of(pool: Pool, methods: Sequence[str], routing: Routing) -> list[Row]:
    """Rows of `methods` in the order of METHODS; those derived from single experts have none."""
    rows = []
    order = list(METHODS)
    for name in sorted(methods, key=lambda name: order.index(name.partition(":")[0])):
        if name == BASE:
            rows.append(Row(name, METHODS[BASE], {"model": "base"}))
        elif name not in DERIVED:
            rows.append(pool_row(name, label_of(name), pool, replace(routing, router=name)))
    return rows


def single_rows(pool: Pool) -> list[Row]:
    """A row for each expert alone."""
    alone = Routing(router="single")
    return [pool_row(name, name, pool.select([name]), alone) for name in pool.names]


def reference_row(label: str, place: str | Path, routing: Routing) -> Row:
    """A row for any other model: a routed model's folder, a pool, an expert, or a base.

    A pool is routed by phatgoose, not by auto: the paper's row is one of gates trained jointly, and
    a row's rule must not depend on what else the experts share or what this machine has.
    """
    if is_routed(place):
        identity = {"routed": sha256_of(Path(place) / ROUTED_INFO)}  # holds the weights' hash too
        return Row(label, label, identity, routing=routing, place=str(place))
    if not is_pool(place):
        identity = {"model": load_base(place).fingerprint}
        return Row(label, label, identity, place=str(place))
    pool = Pool.open(place)
    if len(pool) == 1:
        return pool_row(label, label, pool, Routing(router="single"))
    _check_method("phatgoose", pool, routing)
    return pool_row(label, label, pool, replace(routing, router="phatgoose"))


def pool_row(name: str, label: str, pool: Pool, routing: Routing | None) -> Row:
    """A row of `pool` by `routing`; its identity is of what the router uses, not of names alone."""
    router = router_of(routing or Routing())
    identity = {
        "router": router.routing.router,
        **({"k": router.k} if router.k else {}),
        "kernel": router.kernel,
        "pool": [_expert_digest(expert, router.used(pool)) for expert in pool.experts],
        **({} if router.file_digest is None else {"given": router.file_digest}),
    }
    return Row(name, label, identity, pool, routing)


def _expert_digest(expert: Expert, shared: Sequence[str]) -> str:
    """A hash of what a router uses of an expert: its adapter and its `shared` parts."""
    settings = sorted((site, module.settings) for site, module in expert.modules.items())
    digest = hashlib.sha256(f"{expert.info.adapter_sha256} {settings}".encode())
    if expert.acts_on is not None:
        digest.update(str(expert.acts_on.record()).encode())
    for part in shared:
        tensors = {}
        if part == "embeddings" and expert.embeddings is not None:
            form = f"{expert.info.embedder} {expert.info.embedding_form}"
            tensors = {form: expert.embeddings}
        elif part in ("gates", "means", "readings"):
            tensors = dict(getattr(expert, part))
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].float().numpy().tobytes())
    return digest.hexdigest()[:16]
