"""Who is let in, how much may be sent, and how long all of it took."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .refusals import Refusal

__all__ = ["BodyLimit", "Measured", "key_check"]

UNROUTED = "other"  # the path that requests to nowhere are counted under


def key_check(keys: Sequence[str]) -> Callable[..., None]:
    """A dependency that lets those in who have one of `keys`.

    All keys are compared, by digest and in constant time, so that time tells nothing of them.
    """
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    scheme = HTTPBearer(auto_error=False, description="An API key of this server.")

    def check(credentials: HTTPAuthorizationCredentials | None = Depends(scheme)) -> None:  # noqa: B008
        given = hashlib.sha256((credentials.credentials if credentials else "").encode()).digest()
        if not sum([hmac.compare_digest(given, digest) for digest in digests]):
            raise Refusal(
                401,
                "This server wants an API key: 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


class BodyLimit:
    """Refuses bodies of more than `most` bytes, by what they say or by what comes."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, its body counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        announced = int(length) if length.isdigit() else 0
        received = 0

        async def counted() -> Message:
            nonlocal received
            if announced > self._most:
                raise self._refusal()
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most:
                raise self._refusal()
            return message

        await self._app(scope, counted, send)

    def _refusal(self) -> Refusal:
        return Refusal(413, f"The request has more than {self._most} bytes.", code="too_large")


class Measured:
    """Counts and times every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on and count it when its answer is complete."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            path = getattr(scope.get("route"), "path", UNROUTED)
            self._metrics.answered(path, status, time.perf_counter() - begun)
