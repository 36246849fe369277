"""The server as a process, and its connections: half requests, crowds, unread answers."""

import atexit
import multiprocessing
import os
import shutil
import socket
import sys
import threading
import warnings
from contextlib import ExitStack, suppress

import httpx2
import pytest

import serving
from phatgoose.apps.cli import main
from phatgoose.apps.console import say
from phatgoose.apps.server import run
from phatgoose.config import Serving
from phatgoose.errors import EngineError
from serving import PATH, until

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def address(pool):
    """A server under uvicorn that waits a second for requests."""
    app = serving.app_of(pool, patience=1, most_body=100_000)
    with serving.running(app, patience=1) as address:
        yield address


def opened(address, sent=b""):
    """A connection on which this was sent."""
    host, port = address.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=30)
    sock.sendall(sent)
    return sock


def said(sock):
    """All that comes until the other side closes."""
    content = b""
    with suppress(ConnectionResetError):
        while piece := sock.recv(1 << 16):
            content += piece
    return content


def get(*lines):
    return "\r\n".join(["GET / HTTP/1.1", *lines, "", ""]).encode()


def post(length, *more):
    lines = [f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", *more, "", ""]).encode()


def test_half_a_request_is_not_waited_for_for_ever(address):
    beginnings = [b"", b"GET /v1/mod", get("Host: localhost", "X")[:-4], HEALTH]
    with ExitStack() as stack:
        socks = [stack.enter_context(opened(address, begun)) for begun in beginnings]
        late = stack.enter_context(opened(address, post(100) + b'{"model"'))
        answer = b""
        while not answer.endswith(b"}"):  # the connection stays open
            answer += socks[3].recv(1 << 16)
        assert b"200" in answer
        socks[3].sendall(HEALTH[:9])  # and half a second request
        assert [said(sock) for sock in socks] == [b""] * 4
        answer = said(late)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"within 1 seconds" in answer


CHUNKED = post(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    "sent",
    [
        get("Host: localhost", "X: " + "x" * 200_000),
        b"GET /" + b"x" * 200_000,
        post(9 << 20) + b"x" * (9 << 20),
        CHUNKED + b"400\r\n%b\r\n" % (b"x" * 1024) * 200,
    ],
    ids=["header", "path", "body", "chunks"],
)
def test_more_than_a_request_may_have_is_refused(address, sent):
    with opened(address, sent) as sock:
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 4")


def test_strangers_write_nothing_into_the_log(address, capfd):
    for sent in (
        b"\x00\x01\x02\r\n\r\n",
        get(),
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        get("Host: localhost", "Connection: upgrade, close", "Upgrade: websocket"),
        get("Host: localhost", "Connection: close", "Content-Length: " + "9" * 5000),
        post("\u0661"),
        post("9" * 18, "Connection: close") + b"{}",
    ):
        with opened(address, sent) as sock:
            assert b" 5" not in said(sock)[:13]
    assert capfd.readouterr().err == ""


def test_who_comes_when_there_are_too_many_connections_is_told(pool):
    limits = Serving(max_connections=2)
    with serving.running(serving.app_of(pool), limits) as address, ExitStack() as stack:
        for status in (b"200", b"200", b"503"):
            sock = stack.enter_context(opened(address, HEALTH))
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

    with serving.running(endless, patience=1) as address, opened(address, HEALTH) as sock:
        assert is_gone.wait(60)
        assert len(said(sock)) < 1000 * 99_999


# The process.


@pytest.fixture
def taken():
    """A port where another server listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken


def command(words, stderr):
    """What a process does whose command line is `words`."""
    os.environ["PHATGOOSE_API_KEYS"] = "k1,k2"
    os.dup2(stderr, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    atexit._clear()  # of the process that this is a fork of
    atexit.register(say, "left", err=True)  # which multiprocessing wouldn't call
    warnings.simplefilter("default")
    main(words)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_command_serves_and_ends_in_peace(pool, taken):
    """One process: it answers, and on SIGTERM finishes what it has begun and exits with 0."""
    port = taken.getsockname()[1]
    taken.close()
    words = ["serve", str(serving.folder_of(pool)), "--port", str(port), "--dtype", "float32"]
    words += ["--max-tokens", "200", "--allow-host", "goose.example"]
    stderr, written = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=command, args=(words, written))
    process.start()
    os.close(written)
    body = {"model": "experts", "prompt": "a", "max_tokens": 200, "stream": True}
    options = {"headers": {"Authorization": "Bearer k2"}, "timeout": 60}

    def listens():
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    try:
        address = f"http://127.0.0.1:{port}"
        with os.fdopen(stderr) as told, httpx2.Client(base_url=address, **options) as client:
            assert told.readline() == f"serving experts at {address}\n"  # the models are open
            until(listens)
            for host, status in (("goose.example", 200), ("evil.example", 403)):
                assert client.get("/healthz", headers={"Host": host}).status_code == status
            with client.stream("POST", PATH, json=body) as reply:
                lines = reply.iter_lines()
                next(lines)
                process.terminate()
                assert "data: [DONE]" in lines
            assert told.read().endswith("left\n")  # at once, whatever its threads are at
            process.join(60)
            assert process.exitcode == 0
    finally:
        process.kill()


def test_a_port_that_is_taken_is_told_before_models_are_loaded(taken, tmp_path, capsys):
    (tmp_path / "experts").mkdir()  # which would be refused
    port = str(taken.getsockname()[1])
    with pytest.raises(SystemExit, match="2"):
        main(["serve", str(tmp_path / "experts"), "--port", port])
    told = capsys.readouterr().err
    assert told.startswith(f"error: Port {port} of 127.0.0.1 can't be used: Address already in use")
    assert "another --port" in told
    assert told.count("\n") == 1


def test_what_cannot_start_is_an_error_before_anything_is_served(pool, monkeypatch):
    monkeypatch.setattr("sys.executable", shutil.which("true"))
    with pytest.raises(EngineError, match=r"The tokenizer's new process .* ended at once"):
        run(serving.app_of(pool), "127.0.0.1", 0, Serving())
