"""Tiny models behind the server's application, for tests."""

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi", reason="needs phatgoose[serve]")
pytest.importorskip("uvicorn", reason="needs phatgoose[serve]")
pytest.importorskip("prometheus_client", reason="needs phatgoose[serve]")

import httpx2
from starlette.testclient import TestClient

from phatgoose.apps.server import ServedModel, create_app
from phatgoose.apps.server.app import server_of
from phatgoose.apps.server.guards import RequestGuard
from phatgoose.apps.server.local.batches import Batch
from phatgoose.config import Routing, Serving

PATH, CHATS = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
PROMPT = "to be or not"
GREEDY = {"model": "goose", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
CHAT = {"model": "goose", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('The system speaks first.') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

beside = ThreadPoolExecutor(99).submit  # what is done beside the test


def app_of(
    pool, limits=None, *, template=None, endless=False, patience=20, most_body=1 << 20, **options
):
    """An application that serves `pool`, float32, as "goose" and under router merged as "mean".

    With a chat `template` for the base, and if `endless` without tokens that end answers.
    """
    place = str(folder_of(pool))
    models = [
        ServedModel("goose", place, dtype="float32", routing=Routing("phatgoose")),
        ServedModel("mean", place, Routing("merged"), dtype="float32"),
    ]
    app = create_app(models, limits, **options)
    (guard,) = [each for each in app.user_middleware if each.cls is RequestGuard]
    guard.kwargs.update(most=most_body, seconds=patience)
    for served in app.state.service.models.values():
        served.runner.tokenizer.chat_template = template
        if endless:
            served.runner.ends = frozenset()
    return app


def folder_of(pool):
    """Where the experts of `pool` lie side by side."""
    return pool.experts[0].directory.parent


def ask(client, status=200, path=PATH, **body):
    """The JSON of the answer to `body`, which has this status."""
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def text_of(client, **body):
    """The text of the first answer to `body`."""
    return ask(client, **body)["choices"][0]["text"]


def error_of(client, status=400, path=PATH, **body):
    """The error in the answer to `body`."""
    return ask(client, status, path, **body)["error"]


def chunks_of(client, path=PATH, **body):
    """The chunks of the stream that answers `body`, the last perhaps an error."""
    with client.stream("POST", path, json={**body, "stream": True}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream"), reply.read()
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    assert (lines[-1] == "[DONE]") != ("error" in chunks[-1])
    return chunks


@contextmanager
def client_of(app, **options):
    with TestClient(app, "http://localhost", **options) as client:
        yield client


@contextmanager
def running(app, limits=None, patience=20):
    """The address of the application under our uvicorn, in a thread of this process."""
    server = server_of(app, "127.0.0.1", 0, limits or Serving(), patience)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def far_client_of(app, *limits):
    """A client of the application under our uvicorn."""
    with running(app, *limits) as address, httpx2.Client(base_url=address, timeout=60) as client:
        client.app = app
        yield client


@contextmanager
def held(steps=0):
    """While the context is open engines of this process take so many steps, and then none.

    Until the event is set: whatever an engine was at is then still going on, however fast it is.
    """
    released, taken, step = threading.Event(), itertools.count(), Batch.step

    def held_step(batch):
        if next(taken) >= steps:
            released.wait()
        step(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "step", held_step)
        try:
            yield released
        finally:
            released.set()


def until(holds, seconds=60):
    """Wait until `holds()`; fail after a minute, which is for ever."""
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.01)


def health_of(client):
    return client.get("/healthz").json()


def counts_of(client):
    """The server's metrics, by name."""
    lines = client.get("/metrics").text.splitlines()
    named = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in named}
