"""What other packages registered under one of our groups of entry points."""

from __future__ import annotations

import warnings
from importlib import metadata
from typing import Any


def load_entry_points(group: str) -> dict[str, Any]:
    """The objects registered under `group`, by name and sorted; the first of several with one name.

    One that can't be loaded is left out with a warning that names its package.
    """
    loaded: dict[str, Any] = {}
    for point in sorted(metadata.entry_points(group=group), key=lambda point: point.name):
        try:
            loaded.setdefault(point.name, point.load())
        except Exception as error:  # whatever another package's import may raise
            package = point.dist.name if point.dist else "an unknown package"
            warnings.warn(
                f"{group}: {point.name} of {package} can't be loaded: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
    return loaded


def add_entry_points(group: str, known: dict[str, Any], record: type) -> None:
    """Add to `known` the objects of class `record` that are registered under `group`, by name.

    One of another class, or whose name is taken or not its own, is left out with a warning.
    """
    for name, found in load_entry_points(group).items():
        if isinstance(found, record) and name not in known and getattr(found, "name", name) == name:
            known[name] = found
            continue
        what = (
            f"the name {name!r} is taken"
            if name in known
            else f"it is no {record.__name__} so named"
        )
        warnings.warn(f"{group}: {name} is left out: {what}.", stacklevel=3)
