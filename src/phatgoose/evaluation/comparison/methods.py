"""The methods of a comparison: the base, and every router of the registry (paper section 4.2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from ...config import Routing
from ...errors import ConfigError, PoolError
from ...experts.expert import Expert
from ...experts.pool import REMEDIES, Pool
from ...routing.routers.registry import ROUTERS

__all__ = ["DERIVED", "METHODS", "label_of", "lacking", "runnable_methods"]

# In the order of the tables. A single expert is no method: Oracle and Best Individual choose one.
METHODS = {
    "base": "Base model",
    **{name: spec.label for name, spec in ROUTERS.items() if name != "single"},
}
# These follow from the single experts' results, which they know: they are not zero-shot.
DERIVED = tuple(name for name, spec in ROUTERS.items() if "scores" in spec.given)
EVERY = "all"  # stands for every method whose needs the pool meets
NAMES = {"lora": "LoRA factors"}  # of needs, for people, where their own name says too little


def label_of(router: str) -> str:
    """The name of a router in tables."""
    return METHODS.get(router, router)


def runnable_methods(
    pool: Pool, methods: Iterable[str] | str, routing: Routing
) -> tuple[list[str], list[str]]:
    """(names of the methods to run, notes on those of "all" that were left out).

    Raises ConfigError for an unknown name, PoolError for a named one that can't be run.
    """
    wanted = [methods] if isinstance(methods, str) else list(methods)
    for name in wanted:
        if name not in (EVERY, *METHODS):
            raise ConfigError(
                f"Method {name!r} is unknown; known are {EVERY}, {', '.join(METHODS)}."
            )
    found = lacking(pool, stand_in=routing.stand_in)
    without = {name: experts for name, experts in found.items() if experts}
    if EVERY in wanted:
        notes = [_note(name, experts) for name, experts in without.items()]
        for note in notes:
            warnings.warn(note, stacklevel=3)
        return [name for name in METHODS if name not in without], notes
    for name in wanted:
        if name in without:
            raise PoolError(_refusal(name, without[name][0]))
    return wanted, []


def lacking(pool: Pool, *, stand_in: bool = False) -> dict[str, list[str]]:
    """For each method that needs more than adapters, the experts that lack what it needs.

    With `stand_in` LoRAs need no gates, where gates are all that is needed.
    """

    def lacks(expert: Expert, needs: tuple[str, ...]) -> bool:
        for need in needs:
            part = getattr(expert, need)
            if stand_in and needs == ("gates",):  # made of the factors of LoRAs
                part = part or expert.lora
            if part is None or len(part) == 0:
                return True
        return False

    return {
        name: [expert.name for expert in pool.experts if lacks(expert, spec.needs)]
        for name, spec in ROUTERS.items()
        if spec.needs
    }


def _refusal(method: str, expert: str) -> str:
    """Why `method`, asked for by name, can't be run with `expert`."""
    needs, command = _needs(method)
    remedy = f"run 'phatgoose {command}' on it or " if command else ""
    return f"Expert {expert!r} has no {needs}, which method {method} needs; {remedy}leave it out."


def _note(method: str, experts: list[str]) -> str:
    """Why `method`, one of all, was left out."""
    needs, command = _needs(method)
    remedy = f" (run 'phatgoose {command}' first)" if command else ""
    return (
        f"{METHODS[method]} was left out: {', '.join(experts)} can't be routed by it without "
        f"{needs}{remedy}."
    )


def _needs(method: str) -> tuple[str, str | None]:
    """(what `method` needs but adapters, the command that makes it if there is one)."""
    needs = ROUTERS[method].needs
    commands = [REMEDIES[need] for need in needs if need in REMEDIES]
    return " and ".join(NAMES.get(need, need) for need in needs), (*commands, None)[0]
