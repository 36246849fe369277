"""The application under uvicorn, with limits on connections.

uvicorn limits how many there are, and how long one may idle between two requests. Connections whose
clients are late are cut off here. Other attacks need a proxy in front (docs/serving.md).
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import time
from collections.abc import Collection
from typing import Any, NoReturn

import uvicorn
from fastapi import FastAPI

from ...config import Serving
from ...errors import ConfigError
from ...files.strict import reason

Looks = dict[Any, tuple[object, float]]  # what each connection waits for, and since when


def run(app: FastAPI, host: str, port: int, limits: Serving) -> None:
    """Serve `app` until SIGTERM or SIGINT, then give running requests some time to finish.

    Must be called in the main thread.
    """
    # uvicorn raises the signal that ended it again, which would end the process too.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server = server_of(app, host, port, limits)
    server.run()
    if not server.started:  # which older uvicorns don't tell by the status
        sys.exit(3)


def leave() -> NoReturn:
    """End the process at once, with 0, after what it has registered for its end.

    Python's own end takes seconds on a busy machine, and one in which a thread still composes a
    changed pool is aborted by C++.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def check_address(host: str, port: int) -> None:
    """Raise ConfigError when no server can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ConfigError(
            f"Can't listen at {host}, port {port}: {reason(error)}; choose another by --port or "
            f"--host."
        ) from error


def server_of(app: Any, host: str, port: int, limits: Serving) -> uvicorn.Server:
    """The uvicorn server of `app`, with limits on connections, headers and time."""
    looks: Looks = {}

    async def look() -> None:
        nonlocal looks
        looks = cut_off(server.server_state.connections, looks, limits.read_timeout)

    config = uvicorn.Config(
        app,
        host,
        port,
        http="h11",  # whatever else is installed: it bounds the headers
        ws="none",
        limit_concurrency=limits.max_connections + 1,  # the one that asks counts too
        timeout_graceful_shutdown=limits.shutdown_timeout,
        callback_notify=look,
        timeout_notify=0,  # every second
        # Only proxies that the operator names may say what a client's address is.
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
        # What clients send would fill the disk.
        log_level="error",
        server_header=False,
    )
    server = uvicorn.Server(config)
    return server


def cut_off(connections: Collection[Any], before: Looks, seconds: float) -> Looks:
    """Close connections whose client hasn't sent a request, or read on, for so many seconds.

    `before` is what the last look has returned. RequestGuard gives bodies their time.
    """
    now = time.monotonic()
    looks: Looks = {}
    for each in list(connections):
        cycle = each.cycle  # of uvicorn: one request and its answer
        waits = cycle is None or cycle.response_complete or each.flow.write_paused
        state = cycle, waits, each.transport.get_write_buffer_size()
        last, since = before.get(each, (None, now))
        looks[each] = state, since if state == last else now
        if waits and now - looks[each][1] > seconds:
            each.transport.abort()
    return looks
