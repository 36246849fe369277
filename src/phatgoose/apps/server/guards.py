"""What each request passes before its route: it is counted, allowed, and read completely."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi.security.utils import get_authorization_scheme_param
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...routing.choice import Chosen
from .protocol import CLIENT_GONE, ApiError, busy
from .requests import check_body

UNROUTED = "other"  # the path under which requests to unknown paths are counted

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 300)
MARGINS = (-0.25, 0, 0.1, 0.25, 0.5, 1, 2)  # an expert's own prompts lead by about 1


class Metrics:
    """What Prometheus reads at /metrics: the numbers of one application, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def ours(kind: Any) -> Any:
            return partial(kind, namespace="phatgoose", registry=self.registry)

        self.counter: Callable[..., Counter] = ours(Counter)
        self.gauge: Callable[..., Gauge] = ours(Gauge)
        self.histogram: Callable[..., Histogram] = ours(Histogram)
        self.requests = self.counter("requests", "Requests answered.", ["path", "status"])
        words = "Seconds from a request to the end of its answer."
        self.seconds = self.histogram("request_seconds", words, ["path"], buckets=SECONDS)
        self.prompt = self.counter("prompt_tokens", "Tokens of prompts.", ["model"])
        self.generated = self.counter("generated_tokens", "Tokens generated.", ["model"])
        words = "Answers for whose prompts no expert was chosen."
        self.by_base = self.counter("base_answers", words, ["model"])
        words = "Prompts by the expert that was chosen for them, or the base."
        self.chosen = self.counter("chosen", words, ["model", "expert"])
        words = "By how much the chosen one's score was above the runner-up's."
        labels = ["model", "expert"]
        self.margin = self.histogram("choice_margin", words, labels, buckets=MARGINS)
        self.waiting = self.gauge("waiting", "Answers in the queue.")
        self.running = self.gauge("running", "Answers being computed.")

    def count(self, model: str, choices: Iterable[Chosen]) -> None:
        """Count what was chosen for a model's prompts."""
        for chosen in choices:
            self.chosen.labels(model, chosen.expert).inc()
            if chosen.margin is not None:
                self.margin.labels(model, chosen.expert).observe(chosen.margin)


ANY_HOST = "*"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/", "/healthz", "/health", "/openapi.json")  # paths that say nothing of the models
SAFE = ("GET", "HEAD", "OPTIONS")  # methods that change nothing
NETWORK = 64  # bits of an IPv6 address that name its network


class AccessControl:
    """Decides which requests are allowed.

    `hosts` are names, besides the loopback's, by which clients may call the server; an address of
    all interfaces stands for the machine's name and any IP address, "*" for any name. `keys` may
    name experts, "KEY=EXPERT+EXPERT": `experts` has them for each client that may use no others.
    """

    def __init__(self, hosts: Sequence[str] = (), keys: Sequence[str] = ()) -> None:
        names = {host_of(host) for host in hosts}
        self._any = ANY_HOST in hosts
        self._addresses = bool(names & {"0.0.0.0", "::", ""})
        self._hosts = names.union(LOOPBACK)
        if self._addresses:
            self._hosts.add(socket.gethostname().lower())
        self._digests = list[bytes]()
        self.experts = dict[str, frozenset[str]]()
        for written in keys:
            key, _, experts = written.rpartition("=")
            if not (key and experts):  # keys may end in "="
                key = written
            digest = hashlib.sha256(key.encode()).digest()
            self._digests.append(digest)
            if key != written:
                self.experts[_name_of(digest)] = frozenset(experts.split("+"))

    def check(self, scope: Scope) -> str:
        """The client, by key or by address. Raises ApiError if the request is not allowed."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        for name in map(host_of, hosts):
            is_ours = self._any or name in self._hosts
            # A page whose name was made to resolve here (DNS rebinding) asks for that name.
            if not is_ours and not (self._addresses and _is_address(name)):
                message = "The Host header's name isn't this server's; --allow-host adds names."
                raise ApiError(403, message, code="unknown_host")
        # A browser names the page that asks; pages of other servers may only read.
        origins = {origin.partition("://")[2].lower() for origin in headers.getlist("origin")}
        if scope["method"] not in SAFE and not origins.issubset(map(str.lower, hosts)):
            message = "Pages of other servers may not use this one."
            raise ApiError(403, message, code="foreign_origin")
        if not self._digests or scope["path"] in OPEN:
            return f"address {_network_of(scope.get('client'))}"
        scheme, key = get_authorization_scheme_param(headers.get("authorization"))
        # All keys are compared, by digest and in constant time, so that timing reveals nothing.
        digest = hashlib.sha256(key.encode(errors="replace")).digest()
        same = [hmac.compare_digest(digest, other) for other in self._digests]
        if scheme.lower() != "bearer" or not sum(same):
            message = "This server requires an API key: 'Authorization: Bearer KEY'."
            raise ApiError(401, message, {"WWW-Authenticate": "Bearer"}, "invalid_api_key")
        return _name_of(digest)


def _name_of(digest: bytes) -> str:
    return f"key {digest.hex()[:16]}"


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


def _network_of(client: Sequence[object] | None) -> str:
    name = str(client[0]) if client else "unknown"
    with suppress(ValueError):  # no address of IPv6
        address = ipaddress.IPv6Address(name.partition("%")[0])
        # Proxies that listen for both may write IPv4's as ::ffff:192.0.2.1.
        return str(address.ipv4_mapped or ipaddress.IPv6Network((address, NETWORK), strict=False))
    return name


CLIENT = "phatgoose.client"  # key of a request's scope: who sends it
ALLOWED = "phatgoose.allowed"  # the experts that the client may use, None for all
MOST_BODY = 1 << 20  # bytes
AT_ONCE = 64  # bodies of the greatest size that are held together
PATIENCE = 20.0  # seconds for a body, for headers, and for a client to read on


class RequestGuard:
    """Passes a request to `app` once it is allowed and its body is complete, and counts it.

    A body has at most so many bytes and seconds. The request's scope has its client.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: AccessControl,
        metrics: Metrics,
        most: int = MOST_BODY,
        seconds: float = PATIENCE,
    ) -> None:
        self._app = app
        self._access = access
        self._metrics = metrics
        self._most = most
        self._seconds = seconds
        self.size = 0  # bytes of all bodies that are being read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status = CLIENT_GONE
        received = receive

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            scope[CLIENT] = client = self._access.check(scope)
            scope[ALLOWED] = self._access.experts.get(client)
            if scope["method"] == "POST":
                received = received_again(await self._body_of(scope, receive), receive)
            await self._app(scope, received, watched)
        except ApiError as error:
            await error.reply(scope, receive, watched)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:  # the server stops, and its patience is over
            if status == CLIENT_GONE:  # nothing was answered
                stops = ApiError(503, "The server is shutting down.", code="shutting_down")
                await stops.reply(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            path = getattr(scope.get("route"), "path", "")
            if not path:  # refused here, or unknown
                paths = [route.path for route in scope["app"].routes]
                path = scope["path"] if scope["path"] in paths else UNROUTED
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - begun)

    async def _body_of(self, scope: Scope, receive: Receive) -> bytes:
        request = Request(scope, receive)
        content = bytearray()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page can't make a browser send this type to another server without asking that first.
        if not re.fullmatch(r"application/([\w.-]+\+)?json", kind, re.ASCII):
            raise ApiError(415, "The body must be JSON with 'Content-Type: application/json'.")
        try:
            async with asyncio.timeout(self._seconds):
                async for piece in request.stream():
                    content += piece
                    self.size += len(piece)
                    if len(content) > self._most:
                        message = f"The request has more than {self._most} bytes."
                        raise ApiError(413, message, code="too_large")
                    if self.size > AT_ONCE * self._most:
                        raise busy("Too many requests are being read; try again in a while.")
        except TimeoutError:
            message = f"The request didn't arrive within {self._seconds:g} seconds."
            raise ApiError(408, message, code="timeout") from None
        finally:
            self.size -= len(content)
        return bytes(content)


def received_again(body: bytes, receive: Receive) -> Receive:
    """What an application receives: the `body`, once it is seen to be JSON, then what follows."""
    bodies = [body]

    async def received() -> Message:
        if not bodies:
            return await receive()
        check_body(content := bodies.pop())
        return {"type": "http.request", "body": content, "more_body": False}

    return received
