"""Errors in OpenAI's form, the schema that describes them, and deadlines."""

import pytest
from fastapi import FastAPI, HTTPException
from starlette.testclient import TestClient

import serving  # noqa: F401  skips without the extra
from phatgoose.apps.server.app import answering, install_errors, responses_of
from phatgoose.apps.server.protocol import ChatReply, ChatRequest, without_paths


@pytest.fixture
def client():
    app = FastAPI()
    install_errors(app)

    @app.get("/busy", responses=responses_of(429))
    def busy() -> None:
        raise HTTPException(429, "Later.", {"Retry-After": "3"})

    @app.get("/broken")
    def broken() -> None:
        raise ValueError("a secret")

    @app.post("/chat", **answering(ChatRequest, ChatReply))
    def chat() -> None: ...

    return TestClient(app, raise_server_exceptions=False)


def test_every_error_has_openais_form_and_tells_nothing_of_the_inside(client):
    busy, broken, missing = (client.get(path) for path in ("/busy", "/broken", "/nothing"))
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "3")
    assert busy.json()["error"]["message"] == "Later."
    assert (broken.status_code, missing.status_code) == (500, 404)
    assert "secret" not in broken.text
    assert set(missing.json()["error"]) == set(busy.json()["error"])


def test_the_schema_has_the_bodies_and_errors_of_routes_and_none_of_fastapis_own(client):
    schema = client.get("/openapi.json").json()
    assert "Retry-After" in schema["paths"]["/busy"]["get"]["responses"]["429"]["headers"]
    chat = schema["paths"]["/chat"]["post"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].endswith("ChatRequest")
    assert "text/event-stream" in chat["responses"]["200"]["content"]
    assert {"400", "408", "429", "503", "504"} <= set(chat["responses"])
    assert "422" not in chat["responses"]
    assert "ChatRequest" in schema["components"]["schemas"]
    assert "HTTPValidationError" not in schema["components"]["schemas"]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("/home/me/experts/e0 has no gates.", "e0 has no gates."),
        ("'/home/me/my experts/e0': broken.", "'e0': broken."),
        ("experts/e0 has no gates, nor /a/b and /c/d.", "experts/e0 has no gates, nor b and d."),
        (r"C:\Users\me\e0: broken, ~/x/y too", "e0: broken, y too"),
        ("hub:me/x@v1 or https://a.example/x, 1/2 or m/s", None),
        ("use /v1", "use v1"),
    ],
)
def test_paths_in_messages_are_cut(message, told):
    assert without_paths(message) == (message if told is None else told)
