"""The server's application on Ray Serve: several replicas answer as one process does."""

import json
import socket
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="needs the extra 'ray'")

from phatgoose.apps.ray_engine import connected
from phatgoose.config import Routing, Serving
from serving import ServedModel, folder_of, generated
from tiny import make_tokenizer

replicas = pytest.importorskip("phatgoose.apps.ray_replicas", reason="needs ray[serve]")

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PROMPTS = ("Who?", "1 + 2 =", "jazz quiz", "Tell me")
TOKENS = 4


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def address(llama_pool, port) -> Iterator[str]:
    """Two replicas of a server of the pool, on a Ray of this machine."""
    models = [
        ServedModel(
            "goose", str(folder_of(llama_pool)), dtype="float32", routing=Routing("phatgoose")
        )
    ]
    with (
        connected(),
        replicas.replicated(
            models,
            Serving(),
            ("secret",),
            replicas=2,
            host="127.0.0.1",
            port=port,
            cpus_per_replica=0.5,
        ),
    ):
        yield f"http://127.0.0.1:{port}"


def ask(address: str, path: str, body: dict[str, Any] | None = None, key: str = "secret") -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(address + path, data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_replicas_answer_as_one_process_does(address, llama_pool):
    assert [model["id"] for model in ask(address, "/v1/models")["data"]] == ["goose"]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(address, "/v1/models", key="wrong")
    tokenizer = make_tokenizer(final_eos=False)
    for prompt in PROMPTS:
        body = {"model": "goose", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        got = ask(address, "/v1/completions", body)["choices"][0]["text"]
        wanted = generated(llama_pool, tokenizer(prompt)["input_ids"], TOKENS)
        assert got == tokenizer.decode(wanted, skip_special_tokens=True)
