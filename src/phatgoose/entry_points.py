"""What other packages registered: kinds of experts, routers and suites."""

from __future__ import annotations

import warnings
from importlib import metadata
from operator import attrgetter
from typing import TypeVar

Item = TypeVar("Item")


def add_entry_points(group: str, registered: dict[str, Item], record: type[Item]) -> None:
    """Add to `registered` the objects of class `record` that are registered under `group`, by name.

    One that can't be loaded, is of another class, or whose name is taken or not its own, is left
    out with a warning that names its package.
    """
    for point in sorted(metadata.entry_points(group=group), key=attrgetter("name")):
        try:
            thing = point.load()
            is_named = getattr(thing, "name", point.name) == point.name
            fits = isinstance(thing, record) and is_named
            if not fits or registered.setdefault(point.name, thing) is not thing:
                raise TypeError(f"it is no {record.__name__} of that name, or the name is taken")
        except Exception as error:  # whatever another package's import may raise
            package = point.dist.name if point.dist else "an unknown package"
            why = f"{type(error).__name__}: {error}"
            warnings.warn(f"{group}: {point.name} of {package} is left out: {why}", stacklevel=3)
