"""The application under uvicorn, and limits on connections.

uvicorn only bounds how long a connection may idle between two requests. Here each is checked once
a second, and cut off when it waits too long for the client to send or read.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...config import Serving
from ...errors import ConfigError
from ...files.strict import reason

if sys.platform != "win32":
    import resource

CHECKING = 1.0  # seconds between two checks of the connections
WRITING = 30.0  # seconds in which a client must read what was written to it
HURRIED = 5.0  # the same while other answers wait for a place
UNREAD = 16 << 10  # bytes held for a client in this process, and again in the kernel
SLICE = 4 << 10  # bytes given to h11 at a time
FRAMING = 4 << 10  # bytes of framing that a chunked body may have, plus a quarter of its own
UNWANTED = 16 << 10  # bytes of a body that may still come after the request was answered
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: 0\r\n\r\n"
)
HEAD, BODY, READER, SERVER, CLOSING = "head", "body", "reader", "server", "closing"
EVICTED = (HEAD, BODY)  # connections that make room for new ones, in this order


@dataclass(frozen=True)
class State:
    waits_for: str  # HEAD, BODY, READER (the client reads too slowly), SERVER or CLOSING
    request: object  # None before the first
    since: float


class GuardedConnection(H11Protocol):
    """A connection that `ConnectionGuard` checks."""

    def __init__(self, guard: ConnectionGuard, **options: Any) -> None:
        super().__init__(**options)
        self._guard = guard
        self._body = self._framing = self._unwanted = 0  # bytes of the current request
        self.state = State(HEAD, None, self.loop.time())

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Linux would hold 4 MiB for a client that reads nothing, a stream of 16,000 tokens, and
        # the server wouldn't notice.
        transport.set_write_buffer_limits(UNREAD)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            # asyncio sets TCP_NODELAY only if the listening socket names its protocol; without it
            # each small answer waits 40 ms for an acknowledgement.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Windows has none
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNREAD)
        self._guard.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.open.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # h11 needs 10 µs for each chunk: a second for one read, if its chunks are of one byte. So
        # it gets slices, and after each a client that sends such chunks is cut off.
        for begin in range(0, len(data), SLICE):
            if not self.transport.is_closing():
                self._read(data[begin : begin + SLICE])

    def _read(self, piece: bytes) -> None:
        cycle = self.cycle
        had = 0 if cycle is None else len(cycle.body)
        super().data_received(piece)
        if self.cycle is not cycle:
            self._body = self._framing = self._unwanted = 0
        elif cycle is not None and cycle.more_body:
            if cycle.response_complete:
                self._unwanted += len(piece)
            else:
                self._body += len(cycle.body) - had
                self._framing += len(piece) - (len(cycle.body) - had)
            if self._framing > FRAMING + self._body // 4 or self._unwanted > UNWANTED:
                self.cut()

    def check(self, now: float) -> State:
        if self.transport.is_closing():
            waits_for = CLOSING
        elif self.cycle is None or self.cycle.response_complete:
            waits_for = HEAD
        elif self.cycle.more_body:
            waits_for = BODY
        else:
            waits_for = READER if self.flow.write_paused else SERVER
        if waits_for != self.state.waits_for or self.cycle is not self.state.request:
            self.state = State(waits_for, self.cycle, now)
        return self.state

    def cut(self) -> None:
        self.transport.abort()


class ConnectionGuard:
    """All connections of a server: at most `most`, with `seconds` for each part of a request.

    When there are too many, the one that has kept the server waiting for its request longest is
    closed; if there is none, the new one.
    """

    def __init__(
        self, most: int, seconds: float, is_in_demand: Callable[[], bool] = lambda: False
    ) -> None:
        self._most, self._is_in_demand = most, is_in_demand
        self._limits = {HEAD: seconds, READER: WRITING, CLOSING: WRITING}
        self._limits[BODY] = seconds + 5  # RequestGuard answers a late one first
        self.open: set[GuardedConnection] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: GuardedConnection) -> None:
        self.open.add(connection)
        if len(self.open) > self._most:
            self._make_room(connection)
        if self._timer is None:
            self._timer = connection.loop.call_later(CHECKING, self._check, connection.loop)

    def _make_room(self, new: GuardedConnection) -> None:
        states = {each: each.check(new.loop.time()) for each in self.open - {new}}
        ranks = {
            each: (EVICTED.index(state.waits_for), state.since)
            for each, state in states.items()
            if state.waits_for in EVICTED
        }
        if not ranks:
            new.transport.write(FULL)
            new.transport.close()
            return
        idlest = min(ranks, key=lambda each: ranks[each])
        self.open.discard(idlest)
        idlest.cut()

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        now, limits = loop.time(), dict(self._limits)
        # Other answers wait for the place of a client that reads nothing.
        if self._is_in_demand():
            limits[READER] = HURRIED
        for connection in list(self.open):
            state = connection.check(now)
            if now - state.since > limits.get(state.waits_for, float("inf")):
                connection.cut()
        self._timer = loop.call_later(CHECKING, self._check, loop) if self.open else None


SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN = (signal.SIGHUP,) if sys.platform != "win32" else ()  # to open pools again
BACKLOG = 256  # connections that may wait to be accepted, and are accepted at once
FILES = 64  # files that the process may open besides connections


def run(app: FastAPI, host: str, port: int, limits: Serving) -> None:
    """Serve `app` until SIGTERM or SIGINT, then give running requests some time to finish.

    Must be called in the main thread. Raises ConfigError when it can't listen at the address.
    """
    # uvicorn raises the signal that ended it again, which would end the process too.
    with (
        _listening(host, port) as listener,
        handling_signals(lambda *_: None),
        handling_signals(lambda *_: app.state.follower.ask(), AGAIN),
    ):
        server_of(app, limits).run([listener])


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
    _listening(host, port).close()


def server_of(app: FastAPI, limits: Serving) -> uvicorn.Server:
    """The uvicorn server of `app`, with bounds on connections, headers and time."""
    service = getattr(getattr(app, "state", None), "service", None)
    guard = ConnectionGuard(
        _connections(limits.max_connections),
        limits.read_timeout,
        lambda: service is not None and service.waiting > 0,
    )
    config = uvicorn.Config(
        app,
        # h11 whatever else is installed: it bounds the headers.
        http=cast("Any", partial(GuardedConnection, guard)),
        ws="none",
        timeout_graceful_shutdown=limits.shutdown_timeout,
        backlog=BACKLOG,
        # Only proxies that the operator names may say what a client's address is.
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
        # What clients send would fill the disk.
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
        most = needed + wanted if hard == resource.RLIM_INFINITY else hard
        soft = max(soft, min(needed + wanted, most))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - needed))


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"Can't listen at {host}, port {port}: {reason(error)}; choose another by --port or "
            f"--host."
        ) from error


@contextmanager
def handling_signals(
    handle: Callable[..., None], signals: Sequence[signal.Signals] = SIGNALS
) -> Iterator[None]:
    """Let `handle` have `signals` inside; afterwards the former handlers are back."""
    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
