"""Connections: so many at most, none that sends or reads its part for ever.

uvicorn bounds how long a connection may idle between two requests and nothing else. Here each is
looked at once a second, and is cut off when it stays too long where only the other side can go on.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["ConnectionGuard", "GuardedConnection"]

LOOKING = 1.0  # seconds between two looks at the connections
WRITING = 30.0  # seconds that a client may read nothing of what was written to it
SLICE = 4 << 10  # bytes read before it is seen what they were
FRAMING = 4 << 10  # bytes that chunks may have beside a body's own, and a quarter of that
UNWANTED = 16 << 10  # bytes of a body that still come when the request is answered
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: 0\r\n\r\n"
)
HEAD, BODY, READER, SERVER, CLOSING = "head", "body", "reader", "server", "closing"
WAITS = (HEAD, BODY)  # whose connections make room, in this order


@dataclass(frozen=True)
class State:
    """Who has to go on in a connection, with which request (None: the first), and since when."""

    who: str
    request: object
    since: float


class GuardedConnection(H11Protocol):
    """A connection of `Connections`.

    Always h11's protocol, whatever else is installed: it bounds the headers.
    """

    def __init__(self, connections: ConnectionGuard, **options: Any) -> None:
        super().__init__(**options)
        self._all = connections
        self._body = self._framing = self._unwanted = 0  # bytes of the request that is being read
        self._writes = True  # the other side reads what it is sent
        self.state = State(HEAD, None, self.loop.time())

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, if there is room for one more.

        asyncio lets small answers out at once only where the socket that listens names its
        protocol; without it each waits for an acknowledgement, 40 ms.
        """
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._all.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in what came.

        h11 needs 10 µs for each chunk, however small: a second for what is read in one go, if it
        is chunks of a byte. So it is given little at a time, and who sends such is cut off.
        """
        for begin in range(0, len(data), SLICE):
            if not self.transport.is_closing():
                self._take(data[begin : begin + SLICE])

    def _take(self, piece: bytes) -> None:
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
        """The other side reads too slowly for what it is sent."""
        self._writes = False
        super().pause_writing()

    def resume_writing(self) -> None:
        """It has read on."""
        self._writes = True
        super().resume_writing()

    @property
    def who(self) -> str:
        """Who has to go on."""
        if self.transport.is_closing():
            return CLOSING
        if self.cycle is None or self.cycle.response_complete:
            return HEAD
        if self.cycle.more_body:
            return BODY
        return SERVER if self._writes else READER

    def look(self, now: float) -> State:
        """The state at this time."""
        who = self.who
        if who != self.state.who or self.cycle is not self.state.request:
            self.state = State(who, self.cycle, now)
        return self.state

    def cut(self) -> None:
        """End at once; what was written and not read is lost."""
        self.transport.abort()


class ConnectionGuard:
    """All connections of a server: `most` at once, each part of a request in so many `seconds`.

    `protocol` makes one, as uvicorn asks for it. Where there are too many, the one goes that has
    kept the server waiting for its request longest; where none does, the new one.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most = most
        reading = {HEAD: seconds, BODY: seconds + 5}  # a body has its own answer when it is late
        self._limits = {**reading, READER: WRITING, CLOSING: WRITING}
        self._open: set[GuardedConnection] = set()
        self._timer: asyncio.TimerHandle | None = None

    def protocol(self, **options: Any) -> GuardedConnection:
        """A connection."""
        return GuardedConnection(self, **options)

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: GuardedConnection) -> None:
        """Take one more, and make room for it."""
        self._open.add(connection)
        if len(self._open) > self._most:
            self._make_room(connection)
        if self._timer is None:
            self._timer = connection.loop.call_later(LOOKING, self._look, connection.loop)

    def discard(self, connection: GuardedConnection) -> None:
        """Forget one."""
        self._open.discard(connection)

    def _make_room(self, new: GuardedConnection) -> None:
        now = new.loop.time()
        waiting = [each for each in self._open if each is not new and each.look(now).who in WAITS]
        if waiting:
            idlest = min(waiting, key=lambda each: (WAITS.index(each.state.who), each.state.since))
            self._open.discard(idlest)
            idlest.cut()
            return
        new.transport.write(FULL)
        new.transport.close()

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in list(self._open):
            state = connection.look(now)
            if now - state.since > self._limits.get(state.who, float("inf")):
                connection.cut()
        self._timer = loop.call_later(LOOKING, self._look, loop) if self._open else None
