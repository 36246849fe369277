"""The application: models opened, engine started with the app, routes, limits, errors."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI

from ...config import Serving
from .settings import ServedModel

__all__ = ["create_app"]


def create_app(
    models: Sequence[ServedModel],
    serving: Serving | None = None,
    api_keys: Sequence[str] = (),
) -> FastAPI:
    """The application that serves `models`, which are opened now; its engine runs while it does.

    Without `api_keys` everybody is let in. Raises what opening a model does.
    """
    raise NotImplementedError
