"""What each request passes before its route: it is counted, allowed, and read completely."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import socket
import time
from collections.abc import Collection, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .protocol import CLIENT_GONE, ApiError, busy

UNROUTED = "other"  # the path under which requests to unknown paths are counted

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 300)
CHOICES = (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.5, 1, 5)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """What Prometheus reads at /metrics: the numbers of one application, in their own registry."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        path, model = ["path"], ["model"]
        self.requests = Counter(
            "phatgoose_requests", "Requests answered.", [*path, "status"], registry=own
        )
        words = "Seconds from a request to the end of its answer."
        self.seconds = Histogram(
            "phatgoose_request_seconds", words, path, buckets=SECONDS, registry=own
        )
        self.prompt = Counter("phatgoose_prompt_tokens", "Tokens of prompts.", model, registry=own)
        self.generated = Counter(
            "phatgoose_generated_tokens", "Tokens generated.", model, registry=own
        )
        self.waiting = Gauge("phatgoose_waiting", "Answers in the queue.", registry=own)
        self.running = Gauge("phatgoose_running", "Answers being computed.", registry=own)
        words = "Prompt tokens not read again, since a prompt before began so; whole thousands."
        self.reused = Gauge("phatgoose_prefix_tokens_reused", words, registry=own)
        words = "Bytes of prompts' beginnings that are kept."
        self.prefixes = Gauge("phatgoose_prefix_bytes", words, registry=own)
        words = "Answers in a batch when it read prompts or made a step."
        self.batch = Histogram("phatgoose_batch_rows", words, buckets=SIZES, registry=own)
        words = "Changed pools: reopened, or kept as they were because the new one can't be served."
        self.reopened = Counter("phatgoose_reopened", words, ["outcome"], registry=own)


class GatewayMetrics(Metrics):
    """The metrics of a gateway, which has no batches."""

    def __init__(self) -> None:
        super().__init__()
        for unused in (self.batch, self.reused, self.prefixes):
            self.registry.unregister(unused)
        own = self.registry
        words = "Seconds for the choice of experts, waiting included."
        self.choice = Histogram("phatgoose_choice_seconds", words, buckets=CHOICES, registry=own)
        self.chosen = Counter(
            "phatgoose_chosen", "Answers by the expert that counts most.", ["expert"], registry=own
        )
        words = "Requests that the engine didn't answer: away, broken (off), busy or failed."
        self.failures = Counter("phatgoose_upstream_failures", words, ["how"], registry=own)


class MetricsMiddleware:
    """Counts and times every request by its route, or by its path if that is one of `paths`."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), CLIENT_GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            known = scope["path"] if scope["path"] in self._paths else UNROUTED
            path = str(getattr(scope.get("route"), "path", known))
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - begun)


ANY_HOST = "*"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/", "/healthz", "/health", "/openapi.json")  # paths that say nothing of the models
SAFE = ("GET", "HEAD", "OPTIONS")  # methods that change nothing
NETWORK = 64  # bits of an IPv6 address that name its network


class AccessControl:
    """Decides which requests are allowed.

    `hosts` are names, besides the loopback's, by which clients may call the server; an address of
    all interfaces stands for the machine's name and any IP address, "*" for any name.
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
        bearer = (value.partition(" ") for value in headers.getlist("authorization"))
        keys = (key.strip() for scheme, _, key in bearer if scheme.lower() == "bearer")
        return f"key {self._known(next(keys, None))}"

    def _check_hosts(self, hosts: Sequence[str]) -> None:
        # A page whose name was made to resolve here (DNS rebinding) asks for that name.
        for name in map(host_of, hosts):
            if not (self._any or name in self._hosts or (self._addresses and _is_address(name))):
                raise ApiError(
                    403,
                    "This server doesn't answer to the name in the Host header; its operator can "
                    "add names with --allow-host.",
                    code="unknown_host",
                )

    def _check_origins(self, origins: Sequence[str], hosts: Sequence[str]) -> None:
        # A browser names the page that asks; pages of other servers may only read.
        own = [host.lower() for host in hosts]
        if any(origin.partition("://")[2].lower() not in own for origin in origins):
            message = "Pages of other servers may not use this one."
            raise ApiError(403, message, code="foreign_origin")

    def _known(self, key: str | None) -> str:
        # All keys are compared, by digest and in constant time, so that timing reveals nothing.
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
    name = str(client[0]) if client else "unknown"
    if not _is_address(name) or ipaddress.ip_address(name).version == 4:
        return name
    return str(ipaddress.ip_network((name.partition("%")[0], NETWORK), strict=False))


CLIENT = "phatgoose.client"  # key of a request's scope: who sends it
REQUEST_BODY = "phatgoose.body"  # and its RequestBody
AT_ONCE = 64  # bodies of the greatest size that are held together


class RequestBody:
    """A request's body; the guard counts its bytes while it is held."""

    def __init__(self, guard: RequestGuard, receive: Receive) -> None:
        self._guard, self._receive, self._size = guard, receive, 0
        self._pieces: list[bytes] = []
        self.is_gone = False  # the client has disconnected

    @property
    def content(self) -> bytes:
        return b"".join(self._pieces)

    async def read(self) -> None:
        more = True
        while more:
            message = await self._receive()
            self.is_gone = message["type"] == "http.disconnect"
            self.add(message.get("body", b""))
            more = message.get("more_body", False)

    def add(self, piece: bytes) -> None:
        self._size += len(piece)
        self._guard.held += len(piece)
        self._pieces.append(piece)
        if self._size > self._guard.most:
            raise self._guard.too_large()
        if self._guard.held > AT_ONCE * self._guard.most:
            raise busy("Too many requests are being read; try again in a while.")

    def release(self) -> None:
        self._guard.held -= self._size
        self._pieces, self._size = [], 0


class RequestGuard:
    """Passes a request to `app` once it is allowed and its body is complete.

    A body has at most `most` bytes and arrives within `seconds`. The request's scope has its client
    and its body.
    """

    def __init__(self, app: ASGIApp, access: AccessControl, most: int, seconds: float) -> None:
        self._app, self._access, self.most, self._seconds = app, access, most, seconds
        self.held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_begun = False

        async def noted(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self._answer(scope, receive, noted)
        except asyncio.CancelledError:  # the server stops, and its patience is over
            if is_begun:
                return
            stopped = ApiError(503, "The server is shutting down.", code="shutting_down")
            await JSONResponse(stopped.body, stopped.status_code)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = RequestBody(self, receive)
        try:
            try:
                scope[CLIENT] = self._access.check(scope)
                if scope["method"] == "POST":
                    scope[REQUEST_BODY] = body
                    await self._read(scope, body)
            except ApiError as refusal:
                body.release()
                answer = JSONResponse(refusal.body, refusal.status_code, refusal.headers)
                await answer(scope, receive, send)
                return
            if not body.is_gone:
                await self._app(scope, receive, send)
        finally:
            body.release()

    async def _read(self, scope: Scope, body: RequestBody) -> None:
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page can't make a browser send this type to another server without asking that first.
        if not re.fullmatch(r"application/([\w.-]+\+)?json", kind, re.ASCII):
            raise ApiError(415, "The body must be JSON with 'Content-Type: application/json'.")
        length = headers.get("content-length", "").lstrip("0")[:20]  # 20 digits are too many anyway
        if length.isdecimal() and int(length) > self.most:
            raise self.too_large()
        try:
            async with asyncio.timeout(self._seconds):
                await body.read()
        except TimeoutError:
            message = f"The request didn't arrive within {self._seconds:g} seconds."
            raise ApiError(408, message, code="timeout") from None

    def too_large(self) -> ApiError:
        return ApiError(413, f"The request has more than {self.most} bytes.", code="too_large")
