"""Routings as they were written when `Routing` had a field for each setting of each router.

Saved models and results of comparisons hold such ones. Their fields become the router's text here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...files.strict import shortened
from .registry import ROUTERS, written

READING = {
    "reading_place": "place",
    "reading_from": "first",
    "reading_to": "last",
    "shrinkage": "shrinkage",
    "task_variance": "task_variance",
}
SCORED = {"eps": "eps", "affinity": "affinity", "router_temperature": "temperature"}
INPUT = {"input_temperature": "temperature"}
# By router: the fields that it looked at, and what they are called now.
SETTINGS: dict[str, dict[str, str]] = {
    "random": {"router_seed": "seed"},
    "retrieval": {"retrieval_form": "form", **INPUT},
    "centroid": INPUT,
    "average-activation": SCORED,
    "arrow": {"arrow": "form", "router_temperature": "temperature"},
    "spectr": {"spectr_shortlist": "shortlist"},
    "merged": {},
    "uniform-top-k": {"eps": "eps", "stand_in": "stand_in"},
    "phatgoose": {**SCORED, "stand_in": "stand_in"},
    "phatgoose-input": {"eps": "eps", **INPUT},
    "glider": {"eps": "eps", "router_temperature": "temperature", "glider_lambda": "weight"},
    "logo": {"logo_reads": "reads"},
    "discriminant": {**READING, **INPUT},
    "joint-discriminant": {**READING, "embedding_share": "embedding_share", **INPUT},
    "phatgoose-evidence": {**SCORED, "prior": "prior"},
    "discriminant-phatgoose": {
        **READING,
        **SCORED,
        "input_k": "shortlist",
        "input_temperature": "shortlist_temperature",
        "prior": "prior",
    },
    "best-individual": {},
    "oracle": {},
    "single": {"expert": "expert"},
}
EMBEDDERS = ("retrieval_embedder", "embedder")  # named by who opens a model, never by a file
PER_INPUT = (
    "retrieval",
    "centroid",
    "phatgoose-input",
    "logo",
    "discriminant",
    "joint-discriminant",
)
FIELDS = {
    "router",
    "k",
    "kernel",
    "input_k",
    *(field for each in SETTINGS.values() for field in each),
}
NOW = {"router", "k", "kernel"}


def translated(routing: Mapping[str, Any]) -> dict[str, Any]:
    """`router`, `k` and `kernel` of a `routing` as it was written, now or then.

    Raises ConfigError for fields that were none of a routing.
    """
    routing = {name: routing[name] for name in routing if name not in EMBEDDERS}
    if routing.keys() <= NOW:
        return routing
    unknown = routing.keys() - FIELDS
    if unknown:
        raise ConfigError(f"unknown setting {shortened(min(unknown))}")
    name = str(routing.get("router", "phatgoose"))
    spec = ROUTERS.get(name)
    usual = vars(spec.config()) if spec else {}
    values = {new: routing.get(old) for old, new in SETTINGS.get(name, {}).items()}
    if not values.get("stand_in"):
        values.pop("stand_in", None)
    parts = [
        f"{new}={written(value)}"
        for new in (*usual, *(values.keys() - usual.keys()))
        if (value := values.get(new)) is not None and value != usual.get(new)
    ]
    found: dict[str, Any] = {"router": ":".join([name, *([",".join(parts)] if parts else [])])}
    if spec is None or spec.k is not None:
        found["k"] = routing.get("input_k" if name in PER_INPUT else "k")
    return found | {name: routing[name] for name in ("kernel",) if name in routing}
