"""The rows of a comparison: what is composed for each, and what identifies its results.

METHOD section 5; the paper's Table 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...base.loading import Base, load_base
from ...base.sites import ROUTED
from ...config import Routing
from ...errors import ConfigError, PoolError
from ...experts.expert import Expert
from ...experts.hub import local_folder
from ...experts.pool import Pool
from ...files.regular_file import sha256_of
from ...jobs import absolute
from ...routing.compose import compose, detach
from ...routing.open_model import OpenedModel, is_pool, is_routed, open_model
from ...routing.routers.per_token.affinities import NEED_MEANS
from ...routing.saved.description import ROUTED_INFO

__all__ = ["DERIVED", "METHODS", "SHARED", "Row", "RowPlace"]
__all__ += ["lacking", "pool_row", "reference_row", "rows_of", "single_rows"]

# In the order of the tables. Oracle and Best Individual follow from the single experts' results.
METHODS: dict[str, str] = {
    "base": "Base model",
    "random": "Random",
    "retrieval": "Retrieval",
    "average-activation": "Average Activation",
    "arrow": "Arrow",
    "merged": "Merged Experts",
    "uniform-top-k": "Uniform top-k",
    "phatgoose": "PHATGOOSE",
    "phatgoose-input": "PHATGOOSE per input",
    "best-individual": "Best Individual",
    "oracle": "Oracle",
}
DERIVED = ("best-individual", "oracle")  # they know the answers: not zero-shot

# What the result of each router depends on: settings, and what experts share beside their adapter.
SETTINGS = {
    "phatgoose": ("k", "eps", "stand_in", "affinity", "router_temperature"),
    "phatgoose-input": ("eps",),
    "average-activation": ("k", "eps", "affinity", "router_temperature"),
    "uniform-top-k": ("k", "eps", "stand_in"),
    "arrow": ("k", "arrow", "router_temperature"),
    "random": ("k", "router_seed"),
}
SHARED = {
    "phatgoose": ("gates",),
    "phatgoose-input": ("gates", "means"),
    "uniform-top-k": ("gates",),
    "average-activation": ("means",),
    "retrieval": ("embeddings",),
    "arrow": ("lora",),
}


@dataclass(frozen=True)
class Row:
    """One model of a comparison.

    `identity` tells its results from those of any other model. `pool` None means the base alone or,
    with `place`, whatever is found there.
    """

    name: str
    label: str
    identity: Mapping[str, Any]
    pool: Pool | None = None
    routing: Routing | None = None
    place: str | None = None

    def elsewhere(self) -> RowPlace:
        """The same by the places of its experts."""
        place = None if self.place is None else absolute(self.place)
        experts = None if self.pool is None else self.pool.records()
        return RowPlace(
            replace(self, pool=None, place=place),
            None if experts is None else tuple(record["path"] for record in experts),
        )

    @contextmanager
    def model(self, base: Base) -> Iterator[OpenedModel]:
        """The row's model while the context is open; `base` is as it was afterwards."""
        if self.pool is None and self.place is not None:
            dtype = str(base.model.dtype).removeprefix("torch.")
            given = base if is_routed(self.place) else None
            opened = open_model(self.place, given, dtype=dtype, routing=self.routing)
        elif self.pool is None or self.routing is None:
            opened = OpenedModel(base.model, base.tokenizer)
        else:
            opened = _composed(self.pool, base, self.routing)
        try:
            yield opened
        finally:
            if hasattr(opened.model, ROUTED):
                detach(opened.model)


@dataclass(frozen=True)
class RowPlace:
    """A comparison's row by the places of its experts; `experts` None: it has no pool."""

    row: Row
    experts: tuple[str, ...] | None

    def open(self, loaded: dict[str, Expert]) -> Row:
        """The row; experts are taken from `loaded`, by place, and those missing are added to it.

        Raises PoolError when the experts there are not those that the row was made of.
        """
        if self.experts is None:
            return self.row
        for place in self.experts:
            if place not in loaded:
                loaded[place] = Expert.load(local_folder(place))
        pool = Pool(tuple(loaded[place] for place in self.experts))
        row = pool_row(self.row.name, self.row.label, pool, self.row.routing or Routing())
        if row.identity != self.row.identity:
            raise PoolError(
                f"{self.row.label}: the experts that this worker finds at {self.experts[0]} and "
                f"beside it are not those that the comparison was begun with."
            )
        return row


def _composed(pool: Pool, base: Base, routing: Routing) -> OpenedModel:
    model: PreTrainedModel = compose(
        pool,
        base,
        router=routing.router,
        k=routing.k,
        kernel=routing.kernel,
        eps=routing.eps,
        expert=routing.expert,
        arrow=routing.arrow,
        router_seed=routing.router_seed,
        stand_in=routing.stand_in,
        affinity=routing.affinity,
        router_temperature=routing.router_temperature,
        retrieval_embedder=routing.retrieval_embedder,
    )
    tokenizer: PreTrainedTokenizerBase = base.tokenizer
    return OpenedModel(model, tokenizer)


def lacking(pool: Pool, *, stand_in: bool = False) -> dict[str, list[str]]:
    """For each method that needs more than adapters, the experts that lack what it needs.

    With `stand_in` LoRAs need no gates, where these are all that is needed.
    """

    def lacks(expert: Expert, shared: Sequence[str]) -> bool:
        for name in shared:
            part = getattr(expert, name)
            if stand_in and shared == ("gates",):  # LoRAs have something to make stand-ins of
                part = part or expert.lora
            if part is None or len(part) == 0:
                return True
        return False

    return {
        name: [expert.name for expert in pool.experts if lacks(expert, SHARED[name])]
        for name in METHODS
        if name in SHARED
    }


def rows_of(pool: Pool, methods: Sequence[str], routing: Routing) -> list[Row]:
    """The rows for those of `methods` that are not derived, in the order of METHODS."""
    return [
        _row(name, pool, replace(routing, router=name, expert=None))
        for name in METHODS
        if name in methods and name not in DERIVED
    ]


def single_rows(pool: Pool) -> list[Row]:
    """A row for each expert of the pool, alone."""
    return [
        pool_row(name, name, pool.select([name]), Routing(router="single", k=1))
        for name in pool.names
    ]


def reference_row(label: str, place: str | Path, routing: Routing) -> Row:
    """A row for any other model: a routed model's folder, a pool, an expert, a base by id or path.

    A pool is routed as PHATGOOSE, an expert stands alone. Raises ConfigError for a label that is
    the name of a method.
    """
    if label in METHODS:
        raise ConfigError(f"A reference can't be called {label!r}: that is the name of a method.")
    if is_routed(place):
        identity = {"routed": sha256_of(Path(place) / ROUTED_INFO)}  # holds the weights' hash too
        return Row(label, label, identity, routing=routing, place=str(place))
    if not is_pool(place):
        return Row(label, label, {"model": load_base(place).fingerprint}, place=str(place))
    pool = Pool.open(place)
    alone = Routing(router="single", k=1)
    chosen = alone if len(pool) == 1 else replace(routing, router="phatgoose", expert=None)
    return pool_row(label, label, pool, chosen)


def _row(name: str, pool: Pool, routing: Routing) -> Row:
    if name == "base":
        return Row(name, METHODS[name], {"model": "base"})
    return pool_row(name, METHODS[name], pool, routing)


def pool_row(name: str, label: str, pool: Pool, routing: Routing) -> Row:
    """The row of `pool` routed by `routing`."""
    router = routing.router
    settings = {key: getattr(routing, key) for key in (*SETTINGS.get(router, ()), "kernel")}
    shared = [*SHARED.get(router, ())]
    if settings.get("affinity") in NEED_MEANS:
        shared.append("means")
    identity = {
        "router": router,
        **settings,
        "pool": [_expert_digest(expert, shared) for expert in pool.experts],
    }
    return Row(name, label, identity, pool, routing)


def _expert_digest(expert: Expert, shared: Sequence[str]) -> str:
    """A hash of what a router uses of an expert: its adapter and some of what it shares."""
    settings = sorted((site, module.settings) for site, module in expert.modules.items())
    digest = hashlib.sha256(f"{expert.info.adapter_sha256} {settings}".encode())
    for part in shared:
        tensors: dict[str, Tensor] = {}
        if part == "embeddings" and expert.embeddings is not None:
            tensors = {str(expert.info.embedder): expert.embeddings}
        elif part in ("gates", "means"):
            tensors = dict(getattr(expert, part))
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].float().numpy().tobytes())
    return digest.hexdigest()[:16]
