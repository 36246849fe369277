"""Middleware: bodies are JSON, complete in time, and bounded in size."""

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

CLIENT = "phatgoose.client"  # key of a request's scope: who sends it
BODY = "phatgoose.body"  # and its RequestBody
AT_ONCE = 64  # bodies of the greatest size that are held together
DRAINED = 1  # greatest sizes of a refused body that are read, so that the client sees the answer
DRAINING = 1.0  # seconds for that


class RequestBody:
    """A request's body; the guard counts its bytes while it is held."""

    def __init__(self, guard: RequestGuard) -> None:
        self._guard, self._size = guard, 0
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        """Append `piece`. Raises ApiError when there is no room for it."""
        self._size += len(piece)
        self._guard.held += len(piece)
        self._pieces.append(piece)
        if self._size > self._guard.most:
            raise self._guard.too_large()
        if self._guard.held > AT_ONCE * self._guard.most:
            raise busy("Too many requests are being read; try again in a while.")

    @property
    def content(self) -> bytes:
        """The whole body."""
        return b"".join(self._pieces)

    def release(self) -> None:
        """Free it."""
        self._guard.held -= self._size
        self._pieces, self._size = [], 0


class IncomingBody:
    """The part of a request's body that is still to be received."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_over = False  # nothing more will come
        self.is_gone = False  # the client has disconnected

    async def piece(self) -> bytes:
        """The next piece."""
        message = await self._receive()
        self.is_gone = message["type"] == "http.disconnect"
        self.is_over = not message.get("more_body", False)
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
        body, coming = RequestBody(self), IncomingBody(receive)
        try:
            scope[CLIENT] = self._access.check(scope)
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
            raise ApiError(415, "The body must be JSON with 'Content-Type: application/json'.")
        if _announced(scope) > self.most:
            raise self.too_large()

        async def all_of_it() -> None:
            while not coming.is_over:
                body.add(await coming.piece())

        try:
            await asyncio.wait_for(all_of_it(), self._seconds)
        except asyncio.TimeoutError:
            message = f"The request didn't arrive within {self._seconds:g} seconds."
            raise ApiError(408, message, code="timeout") from None

    async def _drain(self, coming: IncomingBody) -> None:
        """Read on for a while: a client that is still sending would miss the answer."""

        async def some_of_it() -> None:
            left = DRAINED * self.most
            while left > 0 and not coming.is_over:
                left -= len(await coming.piece())

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(some_of_it(), DRAINING)

    def too_large(self) -> ApiError:
        """The error for a larger body."""
        return ApiError(413, f"The request has more than {self.most} bytes.", code="too_large")


def _says_json(scope: Mapping[str, Any]) -> bool:
    found = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1").lower()
    kind: str = found.partition(";")[0].strip()
    return kind == "application/json" or bool(re.fullmatch(r"application/[\w.-]+\+json", kind))


def _announced(scope: Mapping[str, Any]) -> int:
    """The Content-Length, 0 where it is not a number."""
    length = dict(scope["headers"]).get(b"content-length", b"0").lstrip(b"0") or b"0"
    return int(length[:20]) if length.isdigit() else 0  # 20 digits are too many in any case
