"""The methods of a comparison: the base, and every router of the registry (paper section 4.2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from ...config import Routing
from ...errors import ConfigError, PoolError
from ...experts.expert import Expert
from ...experts.pool import REMEDIES, Pool
from ...routing.routers.registry import ROUTERS
from ...routing.routers.router import router_of

__all__ = [
    "BASE",
    "DERIVED",
    "METHODS",
    "check_routable",
    "label_of",
    "label_with_settings",
    "lacking",
    "runnable_methods",
    "unusual_settings",
]

BASE = "base"  # the method that routes nothing
# In the order of the tables. A single expert is no method: Oracle and Best Individual choose one.
METHODS = {
    BASE: "Base model",
    **{name: spec.label for name, spec in ROUTERS.items() if name != "single"},
}
# These follow from the single experts' results, which they know: they are not zero-shot.
DERIVED = tuple(name for name, spec in ROUTERS.items() if "scores" in spec.given)
EVERY = "all"  # stands for every method whose needs the pool meets
NAMES = {"lora": "LoRA factors"}  # of needs, for people, where their own name says too little


def label_of(router: str) -> str:
    """The name of a router in tables."""
    return METHODS.get(router, router)


def label_with_settings(identity: Mapping[str, Any]) -> str:
    """The name of the router of a row's `identity`, with every setting that isn't the usual one.

    Such as "Discriminant, reading place = end, input k = 3".
    """
    return ", ".join([label_of(identity["router"]), *unusual_settings(identity)])


def unusual_settings(routing: Mapping[str, Any]) -> list[str]:
    """The settings of a routing that differ from the defaults, such as "input k = 3"."""
    usual = {name: value for name, value in asdict(Routing()).items() if name != "router"}
    return [
        f"{name.replace('_', ' ')} = {routing[name]}"
        for name, value in usual.items()
        if routing.get(name, value) != value
    ]


def runnable_methods(
    pool: Pool, methods: Iterable[str] | str, routing: Routing
) -> tuple[list[str], list[str]]:
    """(names of the methods to run, notes on those of "all" that were left out).

    Raises ConfigError for an unknown name; for a named one that can't be run PoolError, or
    ConfigError where it can't have the settings in `routing`.
    """
    wanted = [methods] if isinstance(methods, str) else list(methods)
    for name in wanted:
        if name not in (EVERY, *METHODS):
            raise ConfigError(
                f"Method {name!r} is unknown; known are {EVERY}, {', '.join(METHODS)}."
            )
    lacks_of = lacking(pool, stand_in=routing.stand_in)
    without = {name: lacks for name, lacks in lacks_of.items() if lacks}
    if EVERY not in wanted:
        for name in wanted:
            if name in without:
                raise PoolError(_refusal(name, without[name]))
            _check_method(name, pool, routing)
        return wanted, []
    left_out = {name: _note(name, lacks) for name, lacks in without.items()}
    for name in METHODS.keys() - left_out.keys():
        try:
            _check_method(name, pool, routing)
        except (ConfigError, PoolError) as error:
            left_out[name] = f"{METHODS[name]} was left out: {error}"
    notes = [left_out[name] for name in METHODS if name in left_out]
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return [name for name in METHODS if name not in left_out], notes


def _check_method(name: str, pool: Pool, routing: Routing) -> None:
    if name not in (BASE, *DERIVED):
        check_routable(pool, replace(routing, router=name, expert=None))


def check_routable(pool: Pool, routing: Routing) -> None:
    """Raise what composing `pool` by `routing` would for its settings and experts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # composing warns
        router_of(routing).check(pool)


Lacks = dict[str, tuple[str, ...]]  # by the name of an expert, what it has not


def lacking(pool: Pool, *, stand_in: bool = False) -> dict[str, Lacks]:
    """For each method that needs more than adapters, what experts lack of its needs.

    Experts that lack nothing are not there. With `stand_in` LoRAs need no gates, where gates are
    all that is needed.
    """

    def lacks(expert: Expert, need: str, needs: tuple[str, ...]) -> bool:
        stand_ins = stand_in and needs == ("gates",)  # made of the factors of LoRAs
        return not (expert.has(need) or (stand_ins and expert.has("lora")))

    found: dict[str, Lacks] = {}
    for name, spec in ROUTERS.items():
        if spec.needs:
            missing = {
                expert.name: tuple(n for n in spec.needs if lacks(expert, n, spec.needs))
                for expert in pool.experts
            }
            found[name] = {expert: parts for expert, parts in missing.items() if parts}
    return found


def _refusal(method: str, lacks: Lacks) -> str:
    """Why `method`, asked for by name, can't be run: what the first expert of `lacks` hasn't."""
    expert, missing = next(iter(lacks.items()))
    needs, command = _named(missing)
    remedy = f"run 'phatgoose {command}' on it or " if command else ""
    return f"Expert {expert!r} has no {needs}, which method {method} needs; {remedy}leave it out."


def _note(method: str, lacks: Lacks) -> str:
    """Why `method`, one of all, was left out."""
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
