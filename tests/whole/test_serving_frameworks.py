"""The server under LangChain's and LiteLLM's clients (docs/serving.md), in a Python that has them.

PHATGOOSE_CLIENTS names that Python, of a virtual environment of its own for instance; without it
this one is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from typing import Any

import pytest

import serving
from phatgoose.config import Serving

pytestmark = pytest.mark.heavy

PYTHON = os.environ.get("PHATGOOSE_CLIENTS", sys.executable)
MESSAGES = [{"role": "user", "content": "to be or not"}]
WORDS = {"max_tokens": 6, "temperature": 0}

LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI, OpenAI

common = {"base_url": sys.argv[1], "api_key": "secret", "temperature": 0, "max_tokens": 6}
chat = ChatOpenAI(model="goose", **common)
merged = ChatOpenAI(model="goose", extra_body={"router": "merged"}, **common)
print(json.dumps({
    "chat": chat.invoke("to be or not").content,
    "stream": "".join(chunk.content for chunk in chat.stream("to be or not")),
    "merged": merged.invoke("to be or not").content,
    "text": OpenAI(model="goose", **common).invoke("to be or not"),
}))
"""

LITELLM = """
import json, os, sys
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # the one from the package, not from the net
import litellm

common = {"api_base": sys.argv[1], "api_key": "secret", "temperature": 0, "max_tokens": 6}
chat = common | {
    "model": "openai/goose", "messages": [{"role": "user", "content": "to be or not"}]
}
said = lambda reply: reply.choices[0].message.content
chunks = litellm.completion(stream=True, **chat)
print(json.dumps({
    "chat": said(litellm.completion(**chat)),
    "stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
    "merged": said(litellm.completion(extra_body={"router": "merged"}, **chat)),
    "text": litellm.text_completion(
        model="text-completion-openai/goose", prompt="to be or not", **common
    ).choices[0].text,
}))
"""


@pytest.fixture(scope="module")
def address(pool_of):
    options = {"template": serving.CHAT_TEMPLATE, "api_keys": ["secret"]}
    app = serving.app_of(pool_of("llama"), Serving(max_tokens=64), **options)
    with serving.running(app) as address:
        yield f"{address}/v1"


def asked(address: str, path: str, **wish: Any) -> dict[str, Any]:
    """The first choice of the answer to a plain request."""
    request = urllib.request.Request(
        f"{address}/{path}",
        json.dumps({"model": "goose", **WORDS, **wish}).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer secret"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]


@pytest.mark.parametrize(
    ("package", "script"), [("langchain_openai", LANGCHAIN), ("litellm", LITELLM)]
)
def test_clients_of_frameworks_get_the_server_s_answers(address, package, script):
    look = f"import importlib.util as u, sys; sys.exit(u.find_spec('{package}') is None)"
    if subprocess.run([PYTHON, "-c", look], check=False).returncode:
        pytest.skip(f"needs {package} in {PYTHON}; name a Python that has it in PHATGOOSE_CLIENTS")
    done = subprocess.run(
        [PYTHON, "-c", script, address], capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout.splitlines()[-1])
    chat = asked(address, "chat/completions", messages=MESSAGES)["message"]["content"]
    merged = asked(address, "chat/completions", messages=MESSAGES, router="merged")
    assert got == {
        "chat": chat,
        "stream": chat,
        "merged": merged["message"]["content"],
        "text": asked(address, "completions", prompt="to be or not")["text"],
    }
    assert got["chat"] != got["merged"]
