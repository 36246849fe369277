"""What other packages registered under one of our groups of entry points."""

from __future__ import annotations

import warnings
from importlib import metadata
from typing import Any


def load_entry_points(group: str) -> dict[str, Any]:
    """The objects registered under `group`, by entry point's name, in the order of the names.

    One that can't be loaded is left out with a warning that names its package. Of several with one
    name the first wins.
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
