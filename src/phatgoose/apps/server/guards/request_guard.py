"""Middleware: bodies are JSON, complete in time, and bounded in size."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress

from starlette.datastructures import Headers
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
                scope[BODY] = body
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
