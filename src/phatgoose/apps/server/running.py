"""The application under uvicorn."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from ...errors import ConfigError

__all__ = ["run"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 2048  # connections that may wait to be accepted


def run(app: FastAPI, host: str, port: int, shutdown_timeout: int) -> None:
    """Serve `app` until SIGTERM or SIGINT, then let running requests finish for so many seconds.

    Must be called in the main thread. Raises ConfigError when the address can't be listened at.
    """
    config = uvicorn.Config(
        app,
        timeout_graceful_shutdown=shutdown_timeout,
        log_level="warning",
        server_header=False,
    )
    with _listening(host, port) as listener, _ended_by_signals():
        uvicorn.Server(config).run([listener])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"Can't listen at {host}, port {port}: {error.strerror}.") from error


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A signal that uvicorn was ended by is its end and not the process's too."""
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
