"""The form of the inputs that experts were trained on, as they record it, and others held to it."""

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
UNSAID = {"truncation": "right"}  # what every expert had that doesn't say


def recorded_formatting(hyperparameters: Mapping[str, Any], where: str) -> Formatting | None:
    """The formatting among an expert's hyperparameters, None when they say nothing of it.

    An expert that names no truncation was made when inputs were cut on the right. Raises
    ConfigError for what no formatting can be, naming `where` it stood.
    """
    known = {
        f.name: hyperparameters[f.name] for f in fields(Formatting) if f.name in hyperparameters
    }
    return from_mapping(Formatting, {**UNSAID, **known}, where) if known else None


def format_record(
    hyperparameters: Mapping[str, Any], metrics: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What of it stands in a pool's records: settings, and how many inputs were cut if known.

    None for an expert that says nothing.
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
    """Warn of the experts in `records` whose training's inputs had another form than `given`.

    How inputs are cut is left out for experts whose own were all whole.
    """
    others: dict[str, list[str]] = defaultdict(list)
    for record in records:
        found = record.get("formatting")
        if not isinstance(found, Mapping):
            continue
        try:
            trained = recorded_formatting(found, "formatting")
        except ConfigError:
            continue  # a stranger's record, on which nothing depends
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
