"""Errors in OpenAI's form, and the schema that describes the server."""

import pytest

import serving  # noqa: F401  skips without the extra
from phatgoose.apps.server.protocol import without_paths


def test_the_schema_has_the_bodies_and_errors_of_routes_and_none_of_fastapis_own(guarded):
    schema = guarded.get("/openapi.json").json()
    chat = schema["paths"]["/v1/chat/completions"]["post"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].endswith("ChatRequest")
    assert "text/event-stream" in chat["responses"]["200"]["content"]
    assert {"400", "401", "408", "429", "503", "504"} <= set(chat["responses"])
    assert "422" not in chat["responses"]
    assert "ChatRequest" in schema["components"]["schemas"]
    assert "HTTPValidationError" not in schema["components"]["schemas"]


def test_what_breaks_inside_is_not_told(client, monkeypatch):
    monkeypatch.setattr(client.app.state.service, "begun", object())  # which no JSON holds
    reply = client.get("/v1/models")
    assert reply.status_code == 500
    assert reply.json()["error"]["message"] == "The server failed; its log says more."


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("/home/me/experts/e0 has no gates.", "e0 has no gates."),
        ("'/home/me/my experts/e0': broken.", "'e0': broken."),
        ("experts/e0 has no gates, nor /a/b and /c/d.", "experts/e0 has no gates, nor b and d."),
        (r"C:\Users\me\e0: broken, ~/x/y too", "e0: broken, y too"),
        ("hub:me/x@v1 or https://a.example/x, 1/2 or m/s", None),
    ],
)
def test_paths_in_messages_are_cut(message, told):
    assert without_paths(message) == (message if told is None else told)
