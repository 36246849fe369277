"""The server as a process, and its limit of connections."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import socket
import sys
import time
import urllib.error
import urllib.request
import warnings

import pytest

import serving
from phatgoose.apps.cli import main
from phatgoose.apps.server import ServedModel, create_app, run
from phatgoose.apps.server.connections import _connections
from phatgoose.config import Serving
from phatgoose.errors import ConfigError, PhatgooseError


def test_no_more_connections_are_wanted_than_files_may_be_opened(monkeypatch):
    limits = [(1024, 1024)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, value: limits.append(value))
    assert 300 < _connections(1000) < 1000
    limits.append((1024, 4096))
    assert _connections(1000) == 1000
    assert 1000 < limits[-1][0] < 4096
    limits.append((-1, -1))
    assert _connections(1000) == 1000


@pytest.fixture(scope="module")
def pool(pool_of):
    return pool_of("llama")


@pytest.fixture(scope="module")
def app(pool):
    app = serving.app_of(pool, Serving(max_tokens=64), api_keys=["secret"])
    for served in app.state.service.models.values():
        served.runner.tokenizer.chat_template = serving.CHAT_TEMPLATE
    return app


@pytest.fixture(scope="module")
def address(app):
    with serving.running(app) as address:
        yield address


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def command(words: list[str], stderr: int) -> None:
    """What a process does whose command line is `words`."""
    os.environ["PHATGOOSE_API_KEYS"] = "k1,k2"
    os.dup2(stderr, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    warnings.simplefilter("default")
    main(words)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_command_serves_and_ends_in_peace(pool):
    """One process: it answers, and on SIGTERM finishes what it has begun and exits with 0."""
    port = free_port()
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
            process.join(60)
            assert process.exitcode == 0
    finally:
        process.kill()


def posted(address, body):
    """The server's reply to `body`, which may begin to listen a moment later."""
    headers = {"Content-Type": "application/json", "Authorization": "Bearer k2"}
    content = json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/v1/completions", content, headers)
    for _ in range(600):
        try:
            return urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            time.sleep(0.1)
    pytest.fail("nobody listens")


def test_a_port_that_is_taken_is_told(app):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Can't listen at 127.0.0.1, port {port}"):
            run(app, "127.0.0.1", port, Serving())


def test_without_its_extra_the_command_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("phatgoose.apps.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ConfigError, match=r"pip install 'phatgoose\[serve\]'"):
        import phatgoose.apps.server  # noqa: F401


def test_models_that_cannot_be_opened_are_told_before_anything_listens(tmp_path):
    with pytest.raises(PhatgooseError):
        create_app([ServedModel("x", str(tmp_path / "nothing.json"))])


def test_an_address_that_is_taken_is_told_before_models_are_loaded(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("phatgoose.apps.server.create_app", lambda *_: pytest.fail("loaded"))
        with pytest.raises(SystemExit) as ended:
            main(["serve", "experts", "--port", str(port)])
    assert ended.value.code == 2
    assert f"Can't listen at 127.0.0.1, port {port}" in capsys.readouterr().err
