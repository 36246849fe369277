"""Limits on the number of connections and on how long each may wait.

uvicorn only bounds how long a connection may idle between two requests. Here each is checked once a
second, and cut off when it waits too long for the client to send or read.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["ConnectionGuard", "GuardedConnection"]

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
    """What a connection waits for, in which request (None: the first), and since when.

    `waits_for` is a request's head or body, the client as a reader, the server, or the closing.
    """

    waits_for: str
    request: object
    since: float


class GuardedConnection(H11Protocol):
    """A connection that `ConnectionGuard` checks.

    Always h11's protocol, whatever else is installed: it bounds the headers.
    """

    def __init__(self, guard: ConnectionGuard, **options: Any) -> None:
        super().__init__(**options)
        self._guard = guard
        self._body = self._framing = self._unwanted = 0  # bytes of the current request
        self._writes = True  # the client reads what it is sent
        self.state = State(HEAD, None, self.loop.time())

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Register the connection, which may be closed if there are too many.

        asyncio sets TCP_NODELAY only where the listening socket names its protocol; without it each
        small answer waits 40 ms for an acknowledgement. Linux would hold 4 MiB for a client that
        reads nothing, a stream of 16,000 tokens, and nobody would notice.
        """
        super().connection_made(transport)
        transport.set_write_buffer_limits(UNREAD)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Windows has none
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNREAD)
        self._guard.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Unregister the connection."""
        self._guard.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Give `data` to h11 in slices.

        h11 needs 10 µs for each chunk: a second for one read, if its chunks are of one byte. So
        after each slice a client that sends such chunks is cut off.
        """
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

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self._writes = False
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._writes = True
        super().resume_writing()

    @property
    def waits_for(self) -> str:
        """What the connection waits for."""
        if self.transport.is_closing():
            return CLOSING
        if self.cycle is None or self.cycle.response_complete:
            return HEAD
        if self.cycle.more_body:
            return BODY
        return SERVER if self._writes else READER

    def check(self, now: float) -> State:
        """The state at this time."""
        waits_for = self.waits_for
        if waits_for != self.state.waits_for or self.cycle is not self.state.request:
            self.state = State(waits_for, self.cycle, now)
        return self.state

    def cut(self) -> None:
        """Close at once; what the client has not read is lost."""
        self.transport.abort()


class ConnectionGuard:
    """All connections of a server: at most `most`, with `seconds` for each part of a request.

    `protocol` makes one when uvicorn asks for it. When there are too many, the connection is closed
    that has kept the server waiting for its request longest; if there is none, the new one. While
    `is_in_demand()`, because other answers wait, a client that reads nothing is cut off sooner.
    """

    def __init__(
        self, most: int, seconds: float, is_in_demand: Callable[[], bool] = lambda: False
    ) -> None:
        self._most, self._is_in_demand = most, is_in_demand
        self._limits = {HEAD: seconds, READER: WRITING, CLOSING: WRITING}
        self._limits[BODY] = seconds + 5  # RequestGuard answers a late one first
        self._open: set[GuardedConnection] = set()
        self._timer: asyncio.TimerHandle | None = None

    def protocol(self, **options: Any) -> GuardedConnection:
        """A new connection."""
        return GuardedConnection(self, **options)

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: GuardedConnection) -> None:
        """Register a connection, and make room for it."""
        self._open.add(connection)
        if len(self._open) > self._most:
            self._make_room(connection)
        if self._timer is None:
            self._timer = connection.loop.call_later(CHECKING, self._check, connection.loop)

    def discard(self, connection: GuardedConnection) -> None:
        """Unregister a connection."""
        self._open.discard(connection)

    def _make_room(self, new: GuardedConnection) -> None:
        states = {each: each.check(new.loop.time()) for each in self._open - {new}}
        ranks = {
            each: (EVICTED.index(state.waits_for), state.since)
            for each, state in states.items()
            if state.waits_for in EVICTED
        }
        if ranks:
            idlest = min(ranks, key=lambda each: ranks[each])
            self._open.discard(idlest)
            idlest.cut()
            return
        new.transport.write(FULL)
        new.transport.close()

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        now, limits = loop.time(), dict(self._limits)
        if self._is_in_demand():
            limits[READER] = HURRIED
        for connection in list(self._open):
            state = connection.check(now)
            if now - state.since > limits.get(state.waits_for, float("inf")):
                connection.cut()
        self._timer = loop.call_later(CHECKING, self._check, loop) if self._open else None
