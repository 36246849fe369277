"""The application under uvicorn."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from ...config import Serving
from ...errors import ConfigError
from ...files.strict import reason
from .guards import ConnectionGuard

if sys.platform != "win32":
    import resource


SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 256  # connections that may wait to be accepted, and are accepted at once
FILES = 64  # files that the process may open besides connections


def run(app: FastAPI, host: str, port: int, limits: Serving) -> None:
    """Serve `app` until SIGTERM or SIGINT, then give running requests some time to finish.

    Must be called in the main thread. Raises ConfigError when it can't listen at the address.
    """
    with _listening(host, port) as listener, _ended_by_signals():
        server_of(app, limits).run([listener])


def check_address(host: str, port: int) -> None:
    """Raise ConfigError when nothing can listen at the address, before models are loaded."""
    _listening(host, port).close()


def server_of(app: FastAPI, limits: Serving) -> uvicorn.Server:
    """`app` under uvicorn, with limits on its connections.

    Only proxies in FORWARDED_ALLOW_IPS may name a client's address. Only the server's own errors
    are logged: what strangers send would fill the disk.
    """
    service = getattr(getattr(app, "state", None), "service", None)
    connections = ConnectionGuard(
        _connections(limits.max_connections),
        limits.read_timeout,
        lambda: service is not None and service.engine.waiting > 0,
    )
    config = uvicorn.Config(
        app,
        http=cast("Any", connections.protocol),
        ws="none",
        timeout_graceful_shutdown=limits.shutdown_timeout,
        backlog=BACKLOG,
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
        log_level="error",
        server_header=False,
    )
    return uvicorn.Server(config)


def _connections(wanted: int) -> int:
    """The number of connections: `wanted`, or fewer if the process may not open so many files."""
    if sys.platform == "win32":  # which sets no limit on sockets
        return wanted
    used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else FILES
    needed = used + FILES + BACKLOG
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed + wanted:
        raised = needed + wanted
        raised = raised if hard == resource.RLIM_INFINITY else min(raised, hard)
        soft = max(soft, raised)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - needed))


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"Can't listen at {host}, port {port}: {reason(error)}.") from error


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Keep the signal that ended uvicorn, which it raises again, from ending the process too."""
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
