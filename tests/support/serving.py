"""Tiny models behind the server's application, for tests."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="needs phatgoose[serve]")
pytest.importorskip("uvicorn", reason="needs phatgoose[serve]")
pytest.importorskip("prometheus_client", reason="needs phatgoose[serve]")

from fastapi import FastAPI
from starlette.testclient import TestClient

from phatgoose.apps.server import ServedModel, create_app
from phatgoose.apps.server.app import server_of
from phatgoose.apps.server.guards import BodyLimits, RequestGuard
from phatgoose.apps.server.local.batches import Batch
from phatgoose.base import load_base
from phatgoose.config import Routing, Serving
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose

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


def app_of(
    pool: Pool,
    limits: Serving | None = None,
    *,
    template: str | None = None,
    endless: bool = False,
    patience: float = 20,
    most_body: int = 1 << 20,
    **options: Any,
) -> FastAPI:
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
    guard.kwargs.update(limits=BodyLimits(most_body, patience))
    for served in app.state.service.models.values():
        served.runner.tokenizer.chat_template = template
        if endless:
            served.runner.ends = frozenset()
    return app


def ask(client: TestClient, status: int = 200, path: str = PATH, **body: Any) -> Any:
    """The JSON of the answer to `body`, which has this status."""
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def text_of(client: TestClient, **body: Any) -> str:
    """The text of the first answer to `body`."""
    return str(ask(client, **body)["choices"][0]["text"])


def error_of(client: TestClient, status: int = 400, path: str = PATH, **body: Any) -> Any:
    """The error in the answer to `body`."""
    return ask(client, status, path, **body)["error"]


def events(client: TestClient, path: str = PATH, **body: Any) -> list[Any]:
    """The chunks of the stream that answers `body`."""
    with client.stream("POST", path, json={**body, "stream": True}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@contextmanager
def client_of(app: FastAPI, **options: Any) -> Iterator[TestClient]:
    with TestClient(app, "http://localhost", **options) as client:
        yield client


@contextmanager
def running(app: FastAPI, limits: Serving | None = None, patience: float = 20) -> Iterator[str]:
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
def held(steps: int = 0) -> Iterator[threading.Event]:
    """While the context is open engines of this process take so many steps, and then none.

    Until the event is set: whatever an engine was at is then still going on, however fast it is.
    """
    released, taken, step = threading.Event(), itertools.count(), Batch.step

    def held_step(batch: Batch) -> None:
        if next(taken) >= steps:
            released.wait()
        step(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "step", held_step)
        try:
            yield released
        finally:
            released.set()


def until(holds: Callable[[], bool]) -> None:
    """Wait until `holds()`; fail after a minute, which is for ever."""
    limit = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.01)


def generated(pool: Pool, prompt: list[int], tokens: int, **options: Any) -> list[int]:
    """What `generate` answers to `prompt` in this process, greedily."""
    options = {"router": "phatgoose", **options}
    pool = pool.select(options.pop("keep", None), options.pop("leave_out", ()))
    model = compose(pool, load_base(pool.base.id, dtype="float32"), **options)
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
    )[0].tolist()
    return found[len(prompt) :]


def folder_of(pool: Pool) -> Path:
    """Where the experts of `pool` lie side by side."""
    return pool.experts[0].directory.parent


@contextmanager
def blocked(monkeypatch, owner, name):
    """A function that waits until it is let go: yields (it was called, let it go on)."""
    called, go_on = threading.Event(), threading.Event()
    original = getattr(owner, name)

    def waits(*arguments, **options):
        called.set()
        assert go_on.wait(30)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, waits)
    try:
        yield called, go_on
    finally:
        go_on.set()
        monkeypatch.setattr(owner, name, original)


def in_a_thread(work, *arguments, **options):
    found = []
    thread = threading.Thread(target=lambda: found.append(work(*arguments, **options)))
    thread.start()
    return thread, found


def needed(routings) -> int:
    """How many requests need a routing of their own."""
    return sum(each.requests for each in routings.cached.values())
