"""What comes in: only from those who are let in, only JSON, in time, and never too much at once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..api_errors import ApiError, busy
from .access_control import AccessControl

__all__ = ["BODY", "CLIENT", "RequestBody", "RequestGuard"]

CLIENT = "phatgoose.client"  # in a request's scope: who sends it
BODY = "phatgoose.body"  # and what was sent
AT_ONCE = 64  # bodies of the greatest size that are held together
DRAINED = 1  # times the greatest size that is read of a body nobody wants, to answer in peace
DRAINING = 1.0  # seconds for that


class RequestBody:
    """A request's body, counted as long as it is held."""

    def __init__(self, gate: RequestGuard) -> None:
        self._gate, self._size = gate, 0
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        """Hold `piece` too. Raises ApiError when there is no room for it."""
        self._size += len(piece)
        self._gate.held += len(piece)
        self._pieces.append(piece)
        if self._size > self._gate.most:
            raise self._gate.too_large()
        if self._gate.held > AT_ONCE * self._gate.most:
            raise busy("Too many requests are being read; try again in a while.")

    @property
    def content(self) -> bytes:
        """All of it."""
        return b"".join(self._pieces)

    def release(self) -> None:
        """Let go of it."""
        self._gate.held -= self._size
        self._pieces, self._size = [], 0


class IncomingBody:
    """What is still to come of a request's body."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_over = False  # nothing more will come
        self.is_gone = False  # nor will anybody read the answer

    async def piece(self) -> bytes:
        """The next piece."""
        message = await self._receive()
        self.is_gone = message["type"] == "http.disconnect"
        self.is_over = not message.get("more_body", False)
        found: bytes = message.get("body", b"")
        return found


class RequestGuard:
    """Hands requests on once they are let in and have come as a whole.

    Bodies have at most `most` bytes and come within so many `seconds`; those of POST are JSON and
    say so, which no page can make a browser send elsewhere without asking. What they are and who
    sends them stands in the request's scope.
    """

    def __init__(self, app: ASGIApp, doors: AccessControl, most: int, seconds: float) -> None:
        self._app, self._doors, self.most, self._seconds = app, doors, most, seconds
        self.held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, or answer it with what is wrong."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, coming = RequestBody(self), IncomingBody(receive)
        try:
            scope[CLIENT] = self._doors.check(scope)
            if scope["method"] == "POST":
                scope[BODY] = body
                await self._read(scope, coming, body)
        except ApiError as refusal:
            body.release()
            await self._drain(coming)
            headers = {**(refusal.headers or {}), "Connection": "close"}
            await JSONResponse(refusal.body, refusal.status_code, headers)(scope, receive, send)
            return
        try:
            if not coming.is_gone:
                await self._app(scope, receive, send)
        finally:
            body.release()

    async def _read(self, scope: Scope, coming: IncomingBody, body: RequestBody) -> None:
        if not _says_json(scope):
            raise ApiError(
                415, "The body must be JSON, and 'Content-Type: application/json' say so."
            )
        if _announced(scope) > self.most:
            raise self.too_large()

        async def all_of_it() -> None:
            while not coming.is_over:
                body.add(await coming.piece())

        try:
            await asyncio.wait_for(all_of_it(), self._seconds)
        except asyncio.TimeoutError:
            message = f"The request didn't come within {self._seconds:g} seconds."
            raise ApiError(408, message, code="timeout") from None

    async def _drain(self, coming: IncomingBody) -> None:
        """Read on for a while: whoever is still sending would miss the answer."""

        async def some_of_it() -> None:
            left = DRAINED * self.most
            while left > 0 and not coming.is_over:
                left -= len(await coming.piece())

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(some_of_it(), DRAINING)

    def too_large(self) -> ApiError:
        """What to say to more bytes than are read."""
        return ApiError(413, f"The request has more than {self.most} bytes.", code="too_large")


def _says_json(scope: Mapping[str, Any]) -> bool:
    found = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1").lower()
    kind: str = found.partition(";")[0].strip()
    return kind == "application/json" or bool(re.fullmatch(r"application/[\w.-]+\+json", kind))


def _announced(scope: Mapping[str, Any]) -> int:
    """The bytes that the header promises, 0 where it has no sensible number."""
    length = dict(scope["headers"]).get(b"content-length", b"0").lstrip(b"0") or b"0"
    return int(length[:20]) if length.isdigit() else 0  # 20 digits are too many in any case
