"""How an expert's training inputs became tokens, as it records it; a warning when use differs."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ..config import Formatting, from_mapping
from ..errors import ConfigError
from ..files.quoting import one_line

__all__ = ["format_record", "recorded_formatting", "warn_of_other_formatting"]

SHOWN = 3  # experts named in a warning
UNRECORDED = {"truncation": "right"}  # of experts made before it was recorded


def recorded_formatting(hyperparameters: Mapping[str, Any], where: str) -> Formatting | None:
    """The formatting among an expert's hyperparameters, None when none is recorded.

    Raises ConfigError, naming `where` it was found, for values that no formatting can have.
    """
    known = {
        f.name: hyperparameters[f.name] for f in fields(Formatting) if f.name in hyperparameters
    }
    return from_mapping(Formatting, {**UNRECORDED, **known}, where) if known else None


def format_record(
    hyperparameters: Mapping[str, Any], metrics: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What a pool's records say of it: settings, and how many inputs were cut if known.

    None for an expert that records no formatting.
    """
    try:
        formatting = recorded_formatting(hyperparameters, "hyperparameters")
    except ConfigError:
        return None
    if formatting is None:
        return None
    kept = {name: getattr(formatting, name) for name in ("max_input_tokens", "truncation", "chat")}
    return {**kept, "inputs_cut": metrics.get("inputs_cut")}


def warn_of_other_formatting(records: Iterable[Mapping[str, Any]], given: Formatting) -> None:
    """Warn of the experts in `records` whose training inputs were formatted otherwise than `given`.

    Truncation is not compared for experts none of whose inputs were cut.
    """
    others: dict[str, list[str]] = defaultdict(list)
    for record in records:
        found = record.get("formatting")
        if not isinstance(found, Mapping):
            continue
        try:
            trained = recorded_formatting(found, "formatting")
        except ConfigError:
            continue  # a damaged record, on which nothing depends
        if trained is None:
            continue
        names = ["chat"]
        if found.get("inputs_cut") != 0:
            names += ["max_input_tokens", "truncation"]
        if any(getattr(trained, name) != getattr(given, name) for name in names):
            others[_words(trained)].append(one_line(record.get("name"), 80))
    for form, experts in others.items():
        more = f" and {len(experts) - SHOWN} more" if len(experts) > SHOWN else ""
        warnings.warn(
            f"Inputs are read with {_words(given)}, but {', '.join(experts[:SHOWN])}{more} "
            f"{'were' if len(experts) > 1 else 'was'} trained with {form}.",
            stacklevel=3,
        )


def _words(formatting: Formatting) -> str:
    return (
        f"max_input_tokens {formatting.max_input_tokens}, truncation {formatting.truncation}"
        f"{', in the chat template' if formatting.chat else ''}"
    )
