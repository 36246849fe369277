"""What Prometheus reads."""

from __future__ import annotations

import json

import pytest

import serving
from phatgoose.config import Serving

PROMPT = "to be or not"


GREEDY = {"model": "goose", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def app(pool):
    return serving.app_of(pool, Serving(max_routings=2, max_queue=40))


@pytest.fixture(scope="module")
def client(app):
    with serving.client_of(app, raise_server_exceptions=False) as client:
        yield client


def ask(client, status=200, path="/v1/completions", **body):
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def error_of(client, status=400, **body):
    return ask(client, status, **body)["error"]


def events(client, path="/v1/completions", **body):
    with client.stream("POST", path, json={**body, "stream": True}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_metrics_count_what_happened(pool):
    with serving.client_of(serving.app_of(pool)) as client:
        ask(client, **GREEDY)
        events(client, **GREEDY)
        error_of(client, **{**GREEDY, "n": -1})
        client.get("/nowhere")
        reply = client.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain")
        lines = reply.text.splitlines()
    path = 'path="/v1/completions"'
    assert f'phatgoose_requests_total{{{path},status="200"}} 2.0' in lines
    assert f'phatgoose_requests_total{{{path},status="400"}} 1.0' in lines
    assert 'phatgoose_requests_total{path="other",status="404"} 1.0' in lines
    assert 'phatgoose_generated_tokens_total{model="goose"} 12.0' in lines
    assert "phatgoose_running 0.0" in lines
    assert f"phatgoose_request_seconds_count{{{path}}} 3.0" in lines
