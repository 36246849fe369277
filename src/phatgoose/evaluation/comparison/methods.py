"""The methods of a comparison: the base, and every router of the registry (paper section 4.2)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...base import Base, BaseReference, dtype_name, load_base
from ...config import Routing, closest
from ...errors import ConfigError, PoolError
from ...experts.expert import Expert
from ...experts.hub import local_folder
from ...experts.pool import REMEDIES, Pool
from ...files import sha256_of, shortened
from ...jobs import absolute
from ...routing.compose import compose, detach
from ...routing.open_model import OpenedModel, is_pool, is_routed, naming_all_places, open_model
from ...routing.routers.registry import ROUTERS, RouterSpec, choice_of, spec_of
from ...routing.routers.router import router_of
from ...routing.saved.load import base_of
from ...routing.saved.tensors import ROUTED_INFO
from ...sites import ROUTED

BASE = "base"  # the method that routes nothing
# In the order of the tables. A single expert is no method: Oracle and Best Individual choose one.
METHODS = {
    BASE: "Base model",
    **{name: spec.label for name, spec in ROUTERS.items() if name not in ("single", "weights")},
}
# These follow from the single experts' results, which they know: they are not zero-shot.
DERIVED = tuple(name for name, spec in ROUTERS.items() if "scores" in spec.given)
# These need a file of the task's, so they are run by name only.
WITH_EXAMPLES = {name for name, spec in ROUTERS.items() if "examples" in spec.given}
EVERY = "all"  # stands for every method whose needs the pool meets
NAMES = {"lora": "LoRA factors"}  # of needs, for people, where their own name says too little


def label_of(router: str) -> str:
    """A router, with or without settings, in tables: "Arrow, form = peft"."""
    name, _, settings = router.partition(":")
    pairs = [each.partition("=") for each in settings.split(",")] if settings else []
    parts = [f"{key.replace('_', ' ')} = {value}" for key, _, value in pairs]
    known = ROUTERS.get(name)
    return ", ".join([known.label if known else METHODS.get(name, name), *parts])


def label_with_settings(identity: Mapping[str, Any]) -> str:
    """The router of a row's `identity` with its settings, such as "Arrow, form = peft, k = 3"."""
    now = routing_of(identity)
    spec = ROUTERS.get(now["router"].partition(":")[0])
    own = spec.k if spec else now.get("k")
    k = [] if now.get("k") in (None, own) else [f"k = {now['k']}"]
    kernel = [] if now.get("kernel", "auto") == "auto" else [f"kernel = {now['kernel']}"]
    return ", ".join([label_of(now["router"]), *k, *kernel])


def routing_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's `identity` says of router, k and kernel."""
    now = {name: value for name, value in identity.items() if name not in ("pool", "given")}
    spec = ROUTERS.get(now["router"].partition(":")[0])
    if spec and now.get("k", spec.k) is None:
        now["k"] = spec.k
    return now


def runnable_methods(
    pool: Pool, methods: Iterable[str] | str, routing: Routing
) -> tuple[list[str], list[str]]:
    """(names of the methods to run, notes on those of "all" that were left out).

    Raises ConfigError for an unknown name or settings that a named one can't have, else PoolError.
    """
    wanted = [methods] if isinstance(methods, str) else list(methods)
    named = [_canonical(name) for name in wanted if name != EVERY]
    lacks_of = lacking(pool)
    without = {name: lacks for name, lacks in lacks_of.items() if lacks}
    for name in named:
        if name.partition(":")[0] in without:
            raise PoolError(_refusal(name, without[name.partition(":")[0]]))
        _check_method(name, pool, routing)
    if EVERY not in wanted:
        return named, []
    left_out = {name: _note(name, lacks) for name, lacks in without.items()}
    for name in METHODS.keys() - left_out.keys() - WITH_EXAMPLES:
        try:
            _check_method(name, pool, routing)
        except (ConfigError, PoolError) as error:
            left_out[name] = f"{METHODS[name]} was left out: {error}"
    notes = [left_out[name] for name in METHODS if name in left_out]
    every = [name for name in METHODS if name not in left_out and name not in WITH_EXAMPLES]
    return list(dict.fromkeys([*every, *named])), notes


def _canonical(method: str) -> str:
    if method != BASE and method.partition(":")[0] not in METHODS:
        raise ConfigError(
            f"Method {shortened(method)} is unknown; known are {EVERY}, {', '.join(METHODS)}."
            f"{closest(method.partition(':')[0], METHODS)}"
        )
    return method if method == BASE else choice_of(method).text


def _check_method(name: str, pool: Pool, routing: Routing) -> None:
    if name not in (BASE, *DERIVED):
        check_routable(pool, replace(routing, router=name))


def check_routable(pool: Pool, routing: Routing) -> None:
    """Raise what composing `pool` by `routing` would, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # composing warns
        router_of(routing).check(pool)


Lacks = dict[str, tuple[str, ...]]  # by the name of an expert, what it has not


def lacking(pool: Pool) -> dict[str, Lacks]:
    """For each method that needs more than adapters, what experts lack of its needs."""
    found: dict[str, Lacks] = {}
    for name, spec in ROUTERS.items():
        if spec.needs:
            missing = {
                expert.name: tuple(need for need in spec.needs if not expert.has(need))
                for expert in pool.experts
            }
            found[name] = {expert: parts for expert, parts in missing.items() if parts}
    return found


def _refusal(method: str, lacks: Lacks) -> str:
    expert, missing = next(iter(lacks.items()))
    needs, command = _named(missing)
    remedy = f"run 'phatgoose {command}' on it or " if command else ""
    return f"Expert {expert!r} has no {needs}, which method {method} needs; {remedy}leave it out."


def _note(method: str, lacks: Lacks) -> str:
    every = {need for missing in lacks.values() for need in missing}
    needs, command = _named(tuple(need for need in ROUTERS[method].needs if need in every))
    remedy = f" (run 'phatgoose {command}' first)" if command else ""
    return (
        f"{METHODS[method]} was left out: {', '.join(lacks)} can't be routed by it without "
        f"{needs}{remedy}."
    )


def _named(needs: tuple[str, ...]) -> tuple[str, str | None]:
    """(the `needs` for people, the command that makes the first of them if there is one)."""
    commands = [REMEDIES[need] for need in needs if need in REMEDIES]
    return " and ".join(NAMES.get(need, need) for need in needs), (*commands, None)[0]


@dataclass(frozen=True)
class Row:
    """One model of a comparison; `identity` differs from that of any other model.

    `pool` None means the model at `place`, or the base alone if that is None too. In another
    process `locations` of experts stand for the pool.
    """

    name: str
    label: str
    identity: Mapping[str, Any]
    pool: Pool | None = None
    routing: Routing | None = None
    place: str | None = None
    locations: tuple[str, ...] = ()

    @property
    def spec(self) -> RouterSpec | None:
        """Its router's record; None for the base, and for the model at a place."""
        # The routing beside the place of a saved model only has its embedder.
        if self.routing is None or self.place is not None:
            return None
        return spec_of(self.routing.router)

    @property
    def per_input(self) -> bool:
        """True if it leaves whole inputs to experts, who may have answered them alone."""
        return self.spec is not None and self.spec.per_input

    @property
    def base(self) -> BaseReference | None:
        if self.pool is not None:
            return self.pool.base
        return base_of(self.place) if self.place is not None and is_routed(self.place) else None

    def portable(self) -> Row:
        place = None if self.place is None else absolute(self.place)
        if self.pool is not None:
            self.pool.check_on_disk("other processes open experts by their folders")
        records = () if self.pool is None else self.pool.records()
        locations = tuple(record["path"] for record in records)
        return replace(self, pool=None, place=place, locations=locations)

    def loaded(self, experts: dict[str, Expert]) -> Row:
        """The row with its pool; experts that `experts`, by location, lacks are loaded and added.

        Raises PoolError when the experts there are not those that the row was made of.
        """
        if not self.locations:
            return self
        for place in self.locations:
            if place not in experts:
                experts[place] = Expert.load(local_folder(place))
        pool = Pool(tuple(experts[place] for place in self.locations))
        row = pool_row(self.name, self.label, pool, self.routing or Routing())
        if row.identity != self.identity:
            raise PoolError(
                f"{self.label}: the experts that this worker finds at {self.locations[0]} and the "
                f"other places are not those that the comparison was begun with."
            )
        return row

    @contextmanager
    def model(self, base: Base) -> Iterator[OpenedModel]:
        if self.pool is None and self.place is not None:
            dtype = dtype_name(base.model.dtype)
            given = base if is_routed(self.place) else None
            opened = open_model(self.place, given, dtype=dtype, routing=self.routing)
        elif self.pool is None or self.routing is None:
            opened = OpenedModel(base.model, base.tokenizer)
        else:
            model = compose(self.pool, base, routing=self.routing)
            opened = OpenedModel(model, base.tokenizer)
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
    return [
        pool_row(name, name, pool.select([name]), Routing(router="single")) for name in pool.names
    ]


def reference_row(label: str, place: str | Path, routing: Routing) -> Row:
    """A row for any other model: a routed model's folder, a pool, an expert, or a base.

    A pool is routed by phatgoose, not by auto: the paper's row is one of gates trained jointly, and
    a row's rule must not depend on what else the experts share or what this machine has.
    """
    if label in METHODS:
        raise ConfigError(f"A reference can't be called {label!r}: that is the name of a method.")
    if is_routed(place):
        identity = {"routed": sha256_of(Path(place) / ROUTED_INFO)}  # holds the weights' hash too
        return Row(label, label, identity, routing=routing, place=str(place))
    if not is_pool(place):
        with naming_all_places(place):
            identity = {"model": load_base(place).fingerprint}
        return Row(label, label, identity, place=str(place))
    pool = Pool.open(place)
    alone = Routing(router="single")
    chosen = alone if len(pool) == 1 else replace(routing, router="phatgoose")
    check_routable(pool, chosen)
    return pool_row(label, label, pool, chosen)


def pool_row(name: str, label: str, pool: Pool, routing: Routing) -> Row:
    """A row of `pool` by `routing`; its identity is of what the router uses, not of names alone."""
    router = router_of(routing)
    identity = {
        "router": router.routing.router,
        **({"k": router.k} if router.uses_k else {}),
        "kernel": routing.kernel,
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
        tensors: dict[str, Tensor] = {}
        if part == "embeddings" and expert.embeddings is not None:
            made_by = f"{expert.info.embedder} {expert.info.embedding_form}"
            tensors = {made_by: expert.embeddings}
        elif part in ("gates", "means", "readings"):
            tensors = dict(getattr(expert, part))
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].float().numpy().tobytes())
    return digest.hexdigest()[:16]
