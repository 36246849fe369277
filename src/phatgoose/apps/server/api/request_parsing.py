"""A body's bytes to a validated request, at bounded cost.

A body of 1 MiB can hold hundreds of thousands of lists and objects. Creating them takes seconds,
since Python's garbage collector scans all of them again and again, and validating each against
every form that a field may have takes minutes and gigabytes. So they are counted first.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from ....files.quoting import shortened
from ..api_errors import ApiError, bad_request

__all__ = ["parsed"]

MOST_CONTAINERS = 10_000  # objects and lists in one request
MOST_FIELDS = 20_000  # of all objects together
SHOWN = 60  # characters of a field's name that an error repeats

Wanted = TypeVar("Wanted", bound=BaseModel)


def parsed(wanted: type[Wanted], body: bytes) -> Wanted:
    """The request in `body`. Raises ApiError, which repeats only names of fields.

    JSON is strict: no half surrogate pairs, no NaN or infinity, no nesting deeper than 200, no key
    twice in one object.
    """
    _check_size(body)
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise _invalid(f"The body is not JSON: {error}.") from None
    json.loads(body, object_pairs_hook=_check_keys)  # from_json silently takes the last of two
    try:
        return wanted.model_validate(value)
    except ValidationError as error:
        raise _first_of(error, value) from None


def _check_size(body: bytes) -> None:
    """Raise ApiError for more containers or fields than a sensible request has."""

    def is_small(text: bytes) -> bool:
        containers = text.count(b"[") + text.count(b"{")
        return containers <= MOST_CONTAINERS and text.count(b":") <= MOST_FIELDS

    if not is_small(body):
        without_escapes = body.replace(b"\\\\", b"").replace(b'\\"', b"")
        if not is_small(b"".join(without_escapes.split(b'"')[::2])):  # outside of strings
            raise _invalid(
                f"The body has more than {MOST_CONTAINERS} objects and lists or {MOST_FIELDS} "
                f"fields."
            )


def _check_keys(pairs: list[tuple[str, Any]]) -> None:
    """Raise ApiError for a key that one object has twice: other programs would take the first."""
    if len({key for key, _ in pairs}) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        shown = shortened(key, SHOWN)[1:-1]
        raise _invalid(f"The key {shown} appears twice in one object.", shown)


def _first_of(error: ValidationError, body: Any) -> ApiError:
    """The first error of a request, `body`.

    Where a field may have several forms there is one error for each of them. That of the form is
    told which the value has the most of: its error lies deepest, and isn't about its type.
    """
    found = [
        (_place_of(each, body), each)
        for each in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    at = len(found[0][0])
    same = [each for each in found if each[0][:at] == found[0][0] and len(each[1]["loc"]) > at]
    place, first = max(same or found[:1], key=_how_far)
    shown = [shortened(str(part), SHOWN)[1:-1] for part in place]
    message = f"{'.'.join(shown)}: {first['msg']}" if shown else str(first["msg"])
    return _invalid(message, shown[0] if shown else None)


def _place_of(error: ErrorDetails, body: Any) -> tuple[int | str, ...]:
    """Where in `body` an error is: its location without the names of the forms of a field."""
    place, value = [], body
    for part in error["loc"]:
        inside = isinstance(value, dict) and part in value
        if inside or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        place.append(part)
    return tuple(place)


class _Reach(NamedTuple):
    """How far a value was right before its error."""

    depth: int
    item: int  # of the list that it is in
    fits: bool  # in its type


def _how_far(found: tuple[tuple[int | str, ...], ErrorDetails]) -> _Reach:
    place, error = found
    last = place[-1] if place else ""
    item = last if isinstance(last, int) else 0
    return _Reach(len(place), item, not error["type"].endswith("_type"))


def _invalid(message: str, param: str | None = None) -> ApiError:
    return bad_request(message, param, "invalid_request")
