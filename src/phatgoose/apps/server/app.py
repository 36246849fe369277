"""The application: models opened, engine started with the app, routes, limits, errors."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI

from .settings import ServedModel, ServerSettings

__all__ = ["create_app"]


def create_app(models: Sequence[ServedModel], settings: ServerSettings | None = None) -> FastAPI:
    """The application that serves `models`, which are opened now; its engine runs while it does.

    Raises what opening a model does.
    """
    raise NotImplementedError
