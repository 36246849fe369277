"""The server as a process, and its connections: half requests, crowds, unread answers."""

import atexit
import http.client
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from contextlib import ExitStack, contextmanager
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import pytest

import serving
from phatgoose.apps.cli import main
from phatgoose.apps.console import say
from phatgoose.apps.server import app as connections
from phatgoose.config import Serving
from serving import JSON, PATH

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def address(pool):
    """A server under uvicorn that waits a second for requests."""
    app = serving.app_of(pool, patience=1, most_body=100_000)
    with serving.running(app, patience=1) as address:
        yield address


def opened(address):
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


@contextmanager
def closed_at_the_end(sockets):
    with ExitStack() as stack:
        yield [stack.enter_context(sock) for sock in sockets]


def said(sock):
    """All that comes until the other side closes."""
    pieces = [b" "]
    while pieces[-1]:
        try:
            pieces.append(sock.recv(1 << 16))
        except ConnectionResetError:
            break
    return b"".join(pieces[1:])


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
    beginnings = [b"", b"GET /v1/mod", b"GET / HTTP/1.1\r\nHost: localhost\r\nX"]
    with closed_at_the_end([opened(address) for _ in range(5)]) as socks:
        for sock, begun in zip(socks, beginnings, strict=False):
            sock.sendall(begun)
        socks[3].sendall(HEALTH)  # and half a second request
        assert b"200" in answered(socks[3])
        socks[3].sendall(HEALTH[:9])
        socks[4].sendall(head(100) + b'{"model"')
        assert [said(sock) for sock in socks[:4]] == [b""] * 4
        answer = said(socks[4])
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"within 1 seconds" in answer


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000,
        b"GET /" + b"x" * 200_000,
        head(9 << 20) + b"x" * (9 << 20),
        head(0).replace(b"Content-Length: 0", CHUNKED) + b"400\r\n%b\r\n" % (b"x" * 1024) * 200,
    ],
    ids=["header", "path", "body", "chunks"],
)
def test_more_than_a_request_may_have_is_refused(address, sent):
    with opened(address) as sock:
        sock.sendall(sent)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 4")


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
        head("9" * 18, "Connection: close") + b"{}",
    ]
    for content in sent:
        with opened(address) as sock:
            sock.sendall(content)
            answer = said(sock)
        assert b" 5" not in answer[:13]
    assert capfd.readouterr().err == ""


def test_who_comes_when_there_are_too_many_connections_is_told(pool):
    limits = Serving(max_connections=2)
    with serving.running(serving.app_of(pool), limits) as address, ExitStack() as stack:
        for status in (b"200", b"200", b"503"):
            sock = stack.enter_context(opened(address))
            sock.sendall(HEALTH)
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 " + status)


def test_who_reads_nothing_of_a_stream_is_cut_off():
    is_gone = threading.Event()

    async def endless(scope, receive, send):
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):  # more than any buffer holds
            await send({"type": "http.response.body", "body": b"x" * 99_999, "more_body": True})
        is_gone.set()

    with serving.running(endless, patience=1) as address, opened(address) as sock:
        sock.sendall(HEALTH)
        assert is_gone.wait(60)
        assert len(said(sock)) < 1000 * 99_999


@pytest.mark.parametrize("sizes", [(9, 9), (9, 8)])
def test_who_reads_slowly_is_not(sizes):
    transport = MagicMock()
    transport.get_write_buffer_size.side_effect = sizes
    writing = MagicMock(**{"cycle.response_complete": False}, transport=transport)
    looks = connections.cut_off([writing], {}, 0.0)
    connections.cut_off([writing], looks, 0.0)
    assert transport.abort.called == (sizes == (9, 9))


# The process.


@contextmanager
def taken_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def command(words: list[str], stderr: int) -> None:
    """What a process does whose command line is `words`."""
    os.environ["PHATGOOSE_API_KEYS"] = "k1,k2"
    os.dup2(stderr, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    atexit._clear()  # of the process that this is a fork of
    atexit.register(say, "left", err=True)  # which multiprocessing wouldn't call
    warnings.simplefilter("default")
    main(words)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_command_serves_and_ends_in_peace(pool):
    """One process: it answers, and on SIGTERM finishes what it has begun and exits with 0."""
    with taken_port() as port:
        pass  # and free again
    words = ["serve", str(serving.folder_of(pool)), "--port", str(port), "--dtype", "float32"]
    words += ["--max-tokens", "200", "--allow-host", "goose.example"]
    stderr, written = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=command, args=(words, written))
    process.start()
    os.close(written)
    try:
        body = {"model": "experts", "prompt": "a", "max_tokens": 200, "stream": True}
        with os.fdopen(stderr) as told:  # written when the models are open
            assert told.readline() == f"serving experts at http://127.0.0.1:{port}\n"
            reply = posted(f"http://127.0.0.1:{port}", body)
            for host, status in (("goose.example", 200), ("evil.example", 403)):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                connection.request("GET", "/healthz", headers={"Host": host})
                assert connection.getresponse().status == status
                connection.close()
            first = reply.readline()
            process.terminate()
            lines = [first, *reply.read().splitlines()]
            assert b"data: [DONE]" in lines
            assert told.read().endswith("left\n")  # at once, whatever its threads are at
            process.join(60)
            assert process.exitcode == 0
    finally:
        process.kill()


def posted(address, body):
    """The server's reply to `body`, which may begin to listen a moment later."""
    headers = {**JSON, "Authorization": "Bearer k2"}
    content = json.dumps(body).encode()
    request = urllib.request.Request(address + PATH, content, headers)
    for _ in range(600):
        try:
            return urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            time.sleep(0.1)
    pytest.fail("nobody listens")


def test_a_port_that_is_taken_is_told_before_models_are_loaded(monkeypatch, capsys):
    with taken_port() as port:
        monkeypatch.setattr("phatgoose.apps.server.create_app", lambda *_: pytest.fail("loaded"))
        with pytest.raises(SystemExit) as ended:
            main(["serve", "experts", "--port", str(port)])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "Address already in use" in told
    assert f"('127.0.0.1', {port})" in told
