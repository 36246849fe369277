"""Host, origin and API key of a request, checked before its body is read."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from ..api_errors import ApiError

__all__ = ["AccessControl", "host_of"]

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
