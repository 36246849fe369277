"""The application under uvicorn."""

from __future__ import annotations

from fastapi import FastAPI

__all__ = ["run"]


def run(app: FastAPI, host: str, port: int, shutdown_timeout: int) -> None:
    """Serve `app` until SIGTERM or SIGINT."""
    raise NotImplementedError
