"""The application under uvicorn."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

__all__ = ["run"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(app: FastAPI, host: str, port: int, shutdown_timeout: int) -> None:
    """Serve `app` until SIGTERM or SIGINT, then let running requests finish for so many seconds.

    Exits the process with 1 when the port can't be had. Must be called in the main thread.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        timeout_graceful_shutdown=shutdown_timeout,
        log_level="warning",
        server_header=False,
    )
    with _ended_by_signals():
        uvicorn.Server(config).run()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A signal that uvicorn was ended by is its end and not the process's too."""
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
