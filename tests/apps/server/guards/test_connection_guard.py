"""The guard of connections: strangers who send half, read nothing or come in crowds."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

import serving
from phatgoose.apps.server import connections as connection_guard
from phatgoose.apps.server import guards as request_guard
from phatgoose.apps.server.connections import ConnectionGuard, GuardedConnection
from phatgoose.apps.server.engine import Batch
from phatgoose.config import Serving

GREEDY = {"model": "goose", "prompt": "to be", "max_tokens": 3, "temperature": 0}


PATH = "/v1/completions"


@pytest.fixture(scope="module")
def address(pool):
    """A server under uvicorn that waits a second for requests and has room for 8 connections."""
    limits = Serving(read_timeout=1, max_connections=8, max_body=100_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection_guard, "CHECKING", 0.05)
        patch.setattr(request_guard, "DRAINING", 0.05)
        with serving.running(serving.app_of(pool, limits), limits) as address:
            yield address


def opened(address):
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


@contextmanager
def closed_at_the_end(sockets):
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


CHUNKED = b"Transfer-Encoding: chunked"


def said(sock):
    """All that comes until the other side closes."""
    pieces = []
    while True:
        try:
            piece = sock.recv(1 << 16)
        except ConnectionResetError:
            break
        if not piece:
            break
        pieces.append(piece)
    return b"".join(pieces)


def answered(sock):
    """One answer in JSON, whose connection stays open; its body may come by itself."""
    answer = b""
    while not answer.endswith(b"}"):
        piece = sock.recv(1 << 16)
        assert piece, answer
        answer += piece
    return answer


def head(length, *more):
    lines = [f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", *more, "", ""]).encode()


def test_half_a_request_is_not_waited_for_for_ever(address):
    whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    beginnings = [b"", b"GET /v1/mod", b"GET / HTTP/1.1\r\nHost: localhost\r\nX"]
    with closed_at_the_end([opened(address) for _ in range(5)]) as socks:
        for sock, begun in zip(socks, beginnings, strict=False):
            sock.sendall(begun)
        socks[3].sendall(whole)  # and half a second request
        assert b"200" in answered(socks[3])
        socks[3].sendall(whole[:9])
        socks[4].sendall(head(100) + b'{"model"')
        assert [said(sock) for sock in socks[:4]] == [b""] * 4
        answer = said(socks[4])
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"within 1 seconds" in answer


def test_a_client_that_goes_away_while_it_sends_is_forgotten(address, capfd):
    with opened(address) as sock:
        sock.sendall(head(100) + b'{"model"')
    with opened(address) as sock:  # the server has seen it by the time it answers this
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert said(sock).startswith(b"HTTP/1.1 200 ")
    assert capfd.readouterr().err == ""


def test_those_who_wait_make_room_for_those_who_ask(address):
    with closed_at_the_end([opened(address) for _ in range(30)]) as waiting:
        for _ in range(3):
            with opened(address) as sock:
                sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        assert [said(sock) for sock in waiting[:20]] == [b""] * 20


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000,
        b"GET /" + b"x" * 200_000,
        head(0).replace(b"Content-Length: 0", CHUNKED) + b"1\r\nx\r\n" * 9**5,
        head(0).replace(b"Content-Length: 0", CHUNKED) + (b"1;" + b"x" * 999 + b"\r\nx\r\n") * 999,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + CHUNKED + b"\r\n\r\n" + b"1\r\nx\r\n" * 9**5,
        head(300_000) + b"x" * 300_000,
    ],
    ids=["header", "path", "chunks", "names", "unwanted", "body"],
)
def test_more_than_a_request_may_have_ends_the_connection(address, sent):
    with opened(address) as sock:
        try:
            sock.sendall(sent)
        except OSError:
            return  # cut off while it was sending
        answer = said(sock)
    assert answer[:10] in (b"", b"HTTP/1.1 4") or sent.startswith(b"GET / ")


def test_a_body_in_chunks_is_read(address):
    body = json.dumps({**GREEDY, "user": "x" * 50_000}).encode()
    pieces = [body[begin : begin + 64] for begin in range(0, len(body), 64)]
    start = head(0, "Connection: close").replace(b"Content-Length: 0", CHUNKED)
    with opened(address) as sock:
        sock.sendall(start + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n")
        assert said(sock).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_is_somewhat_too_large_is_told_so(address):
    for content in (head(150_000), head(0).replace(b"Content-Length: 0", b"X: 1")):
        with opened(address) as sock:
            sock.sendall(content + b"x" * 150_000)
            assert said(sock).startswith(b"HTTP/1.1 4")


def test_strangers_write_nothing_into_the_log(address, capfd):
    sent = [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade, close\r\n"
        b"Upgrade: websocket\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: "
        + b"9" * 5000
        + b"\r\n\r\n",
        head("\u0661"),
        head("9" * 18) + b"{}",
    ]
    for content in sent:
        with opened(address) as sock:
            sock.sendall(content)
            answer = said(sock)
        assert b" 5" not in answer[:13]
    assert capfd.readouterr().err == ""


async def nobody(scope, receive, send):
    """An application that never answers."""
    await asyncio.sleep(1000)


class FakeTransport:
    """A connection whose other side does nothing."""

    def __init__(self):
        self.aborted = self.closed = False
        self.written = b""

    def get_extra_info(self, name, default=None):
        return default

    def is_closing(self):
        return self.closed

    def write(self, data):
        self.written += data

    def close(self):
        self.closed = True

    def abort(self):
        self.closed = self.aborted = True

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def pause_reading(self):
        pass

    resume_reading = pause_reading


def test_small_answers_leave_at_once():
    """TCP_NODELAY, which asyncio doesn't set for sockets as `socket.create_server` makes them."""

    async def connect(sock):
        transport = FakeTransport()
        transport.get_extra_info = {"socket": sock}.get
        server = serving.server_of(nobody, Serving())
        options = {"config": server.config, "server_state": server.server_state, "app_state": {}}
        connection = GuardedConnection(ConnectionGuard(3, 1000), **options)
        connection.connection_made(transport)
        connection.connection_lost(None)

    with socket.socket() as sock:
        asyncio.run(connect(sock))
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_who_reads_nothing_is_cut_off_and_who_is_answered_is_not(monkeypatch):
    asyncio.run(look_at_connections(monkeypatch))


async def look_at_connections(monkeypatch):
    monkeypatch.setattr(connection_guard, "WRITING", 0.0)
    server = serving.server_of(nobody, Serving())
    all_of_them = ConnectionGuard(3, 1000)
    options = {"config": server.config, "server_state": server.server_state, "app_state": {}}

    def connected():
        connection, transport = GuardedConnection(all_of_them, **options), FakeTransport()
        connection.connection_made(transport)
        return connection, transport

    pairs = [connected() for _ in range(3)]
    for connection, _ in pairs:
        connection.data_received(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    refused, transport = connected()  # all others are being answered
    assert transport.written.startswith(b"HTTP/1.1 503 ")
    assert [t.closed for _, t in pairs] == [False] * 3
    pairs[0][0].pause_writing()
    pairs[1][1].close()
    loop = asyncio.get_running_loop()
    for _ in range(2):
        all_of_them._check(loop)
        await asyncio.sleep(0.01)
    assert [t.aborted for _, t in pairs] == [True, True, False]
    assert transport.aborted
    for connection, _ in [*pairs, (refused, transport)]:
        connection.connection_lost(None)
    assert all_of_them.open == set()
    tasks = list(server.server_state.tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


LONG = {**GREEDY, "max_tokens": 1000, "stream": True, "ignore_eos": True}


@contextmanager
def unread(address, number):
    """So many clients that ask for a long stream and read nothing of it."""
    parts = urlsplit(address)
    body = json.dumps(LONG).encode()
    with closed_at_the_end([socket.socket() for _ in range(number)]) as socks:
        for sock in socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((parts.hostname, parts.port))
            sock.sendall(head(len(body)) + body)
        yield socks


@contextmanager
def patient_for(pool, monkeypatch, **seconds):
    """(address, engine) of a server whose guard has these times instead of the docs'."""
    for name, value in {"CHECKING": 0.05, **seconds}.items():
        monkeypatch.setattr(connection_guard, name, value)
    app = serving.app_of(pool, Serving(max_tokens=1000, read_timeout=60))
    with serving.running(app) as address:
        yield address, app.state.service.engine


def test_a_stream_that_nobody_reads_is_cut_off_and_frees_its_place(pool, monkeypatch):
    server = patient_for(pool, monkeypatch, WRITING=0.5)
    with server as (address, engine), serving.held(500) as released, unread(address, 1) as (sock,):
        serving.until(lambda: engine.running == 1)
        (sequence,) = engine._running()
        serving.until(lambda: sequence.is_cancelled)
        released.set()
        serving.until(lambda: engine.running == 0)
        assert len(sequence.generated) < 1000
        assert b"[DONE]" not in said(sock)


def test_streams_that_nobody_reads_make_room_for_who_waits(pool, monkeypatch):
    """Beside 20 of them from one address a short answer waits for no other to end."""
    steps, step = [], Batch.step

    def slow(batch):
        steps.append(len(batch.sequences))
        time.sleep(0.004)
        step(batch)

    monkeypatch.setattr(Batch, "step", slow)
    body = json.dumps(GREEDY).encode()
    with patient_for(pool, monkeypatch, HURRIED=0.1) as (address, engine), unread(address, 20):
        serving.until(lambda: engine.waiting and engine.running)
        with opened(address) as sock:
            sock.sendall(head(len(body), "Connection: close") + body)
            assert said(sock).startswith(b"HTTP/1.1 200 ")
        number = len(steps)
    assert max(steps) >= 10
    assert number < 1000
