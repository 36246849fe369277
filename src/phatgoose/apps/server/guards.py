"""Guards: who may use the server, how much a request may send, how long it may take.

Host, origin and API key of a request, checked before its body is read.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .api_errors import ApiError, busy

ANY_HOST = "*"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/", "/healthz", "/openapi.json")  # paths that say nothing of the models
SAFE = ("GET", "HEAD", "OPTIONS")  # methods that change nothing
NETWORK = 64  # bits of an IPv6 address that name its network


class AccessControl:
    """Decides which requests are allowed.

    `hosts` are names, besides the loopback's, by which clients may call the server. An address of
    all interfaces stands for the machine's name and any IP address, "*" for any name. Without
    `keys` every client that knows a name is allowed.
    """

    def __init__(self, hosts: Sequence[str] = (), keys: Sequence[str] = ()) -> None:
        names = {host_of(host) for host in hosts}
        self._any = ANY_HOST in hosts
        self._addresses = bool(names & {"0.0.0.0", "::", ""})
        own = {socket.gethostname().lower()} if self._addresses else set()
        self._hosts = {*LOOPBACK, *names, *own}
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, scope: Scope) -> str:
        """The client, by key or by address. Raises ApiError if the request is not allowed."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        self._check_hosts(hosts)
        if scope["method"] not in SAFE:
            self._check_origins(headers.getlist("origin"), hosts)
        if not self._digests or scope["path"] in OPEN:
            return f"address {_network_of(scope.get('client'))}"
        return f"key {self._known(_key_of(headers))}"

    def _check_hosts(self, hosts: Sequence[str]) -> None:
        """A page whose name was made to resolve here (DNS rebinding) asks for that name."""
        for name in map(host_of, hosts):
            if not (self._any or name in self._hosts or (self._addresses and _is_address(name))):
                raise ApiError(
                    403,
                    "This server doesn't answer to the name in the Host header; its operator can "
                    "add names with --allow-host.",
                    code="unknown_host",
                )

    def _check_origins(self, origins: Sequence[str], hosts: Sequence[str]) -> None:
        """A browser names the page that asks; pages of other servers may only read."""
        own = [host.lower() for host in hosts]
        if any(origin.partition("://")[2].lower() not in own for origin in origins):
            message = "Pages of other servers may not use this one."
            raise ApiError(403, message, code="foreign_origin")

    def _known(self, key: str | None) -> str:
        """A name for the client who has `key`.

        All keys are compared, by digest and in constant time, so that timing reveals nothing.
        """
        given = hashlib.sha256((key or "").encode(errors="replace")).digest()
        same = [hmac.compare_digest(given, digest) for digest in self._digests]
        if key is None or not sum(same):
            raise ApiError(
                401,
                "This server requires an API key: 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return given.hex()[:16]


def host_of(written: str) -> str:
    """The name or address in "NAME", "NAME:PORT", "[ADDRESS]:PORT" or an IPv6 address alone."""
    written = written.strip().lower()
    if written.startswith("["):
        return written[1:].partition("]")[0]
    if written.count(":") > 1:
        return written
    return written.partition(":")[0].rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _network_of(client: Sequence[Any] | None) -> str:
    """The address of a client; an IPv6 one's network, all of which is its own."""
    name = str(client[0]) if client else "unknown"
    if not _is_address(name) or ipaddress.ip_address(name).version == 4:
        return name
    return str(ipaddress.ip_network((name.partition("%")[0], NETWORK), strict=False))


def _key_of(headers: Headers) -> str | None:
    for value in headers.getlist("authorization"):
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer":
            return key.strip()
    return None


# -------------------------------------------------------------------------------------------------
# Limits on the number of connections and on how long each may wait.
#
# uvicorn only bounds how long a connection may idle between two requests. Here each is checked
# once a second, and cut off when it waits too long for the client to send or read.
# -------------------------------------------------------------------------------------------------

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


# -------------------------------------------------------------------------------------------------
# Middleware: bodies are JSON, complete in time, and bounded in size.
# -------------------------------------------------------------------------------------------------

CLIENT = "phatgoose.client"  # key of a request's scope: who sends it
REQUEST_BODY = "phatgoose.body"  # and its RequestBody
AT_ONCE = 64  # bodies of the greatest size that are held together
DRAINED = 1  # greatest sizes of a refused body that are read, so that the client sees the answer
DRAINING = 1.0  # seconds for that


class RequestBody:
    """A request's body; the guard counts its bytes while it is held."""

    def __init__(self, guard: RequestGuard, receive: Receive) -> None:
        self._guard, self._receive, self._size = guard, receive, 0
        self._pieces: list[bytes] = []
        self._is_over = False  # nothing more will come
        self.is_gone = False  # the client has disconnected

    @property
    def content(self) -> bytes:
        """All that was read."""
        return b"".join(self._pieces)

    async def read(self) -> None:
        """Read all of it. Raises ApiError when there is no room for it."""
        while not self._is_over:
            self.add(await self._piece())

    def add(self, piece: bytes) -> None:
        """Hold `piece`. Raises ApiError when there is no room for it."""
        self._size += len(piece)
        self._guard.held += len(piece)
        self._pieces.append(piece)
        if self._size > self._guard.most:
            raise self._guard.too_large()
        if self._guard.held > AT_ONCE * self._guard.most:
            raise busy("Too many requests are being read; try again in a while.")

    async def drain(self) -> None:
        """Read on without holding it: a client that is still sending would miss the answer."""
        left = DRAINED * self._guard.most
        while left > 0 and not self._is_over:
            left -= len(await self._piece())

    def release(self) -> None:
        """Free what is held."""
        self._guard.held -= self._size
        self._pieces, self._size = [], 0

    async def _piece(self) -> bytes:
        message = await self._receive()
        self.is_gone = message["type"] == "http.disconnect"
        self._is_over = not message.get("more_body", False)
        found: bytes = message.get("body", b"")
        return found


class RequestGuard:
    """Passes a request to `app` once it is allowed and its body is complete.

    A body has at most `most` bytes and arrives within `seconds`. A POST must declare a JSON content
    type, which a page can't make a browser send to another server without asking it. The request's
    scope has its client and its body.
    """

    def __init__(self, app: ASGIApp, access: AccessControl, most: int, seconds: float) -> None:
        self._app, self._access, self.most, self._seconds = app, access, most, seconds
        self.held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = RequestBody(self, receive)
        try:
            scope[CLIENT] = self._access.check(scope)
            if scope["method"] == "POST":
                scope[REQUEST_BODY] = body
                await self._read(scope, body)
        except ApiError as refusal:
            body.release()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(body.drain(), DRAINING)
            headers = {**(refusal.headers or {}), "Connection": "close"}
            await JSONResponse(refusal.body, refusal.status_code, headers)(scope, receive, send)
            return
        try:
            if not body.is_gone:
                await self._app(scope, receive, send)
        finally:
            body.release()

    async def _read(self, scope: Scope, body: RequestBody) -> None:
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if not re.fullmatch(r"application/([\w.-]+\+)?json", kind, re.ASCII):
            raise ApiError(415, "The body must be JSON with 'Content-Type: application/json'.")
        length = headers.get("content-length", "").lstrip("0")[:20]  # 20 digits are too many anyway
        if length.isdecimal() and int(length) > self.most:
            raise self.too_large()
        try:
            await asyncio.wait_for(body.read(), self._seconds)
        except asyncio.TimeoutError:
            message = f"The request didn't arrive within {self._seconds:g} seconds."
            raise ApiError(408, message, code="timeout") from None

    def too_large(self) -> ApiError:
        """The error for a larger body."""
        return ApiError(413, f"The request has more than {self.most} bytes.", code="too_large")
