"""What checks of clients share: where the server is, a tool, and a line of JSON for each check."""

import json
import os
import time
import urllib.request
from contextlib import contextmanager
from importlib.metadata import version
from typing import Literal

import pydantic

URL, MODEL, KEY = os.environ["CLIENTS_URL"], os.environ["CLIENTS_MODEL"], "secret"
PROMPT, ASKED = "Tell me a story about a heron.", "What is the weather in Bonn?"
TALK, QUESTION = ([{"role": "user", "content": text}] for text in (PROMPT, ASKED))


class Weather(pydantic.BaseModel, extra="forbid"):
    """The weather in a city."""

    city: Literal["Bonn", "Rome"]


def weather(city: Literal["Bonn", "Rome"]) -> str:
    """The weather in a city."""
    return f"rain in {city}"


@contextmanager
def check(package, name):
    """A check of `package`, which any exception fails; it is reported, and the rest goes on."""
    begun, row = time.monotonic(), {"client": package, "version": version(package), "check": name}
    try:
        yield
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    os.write(1, json.dumps({**row, "seconds": time.monotonic() - begun}).encode() + b"\n")


def check_freed():
    """Fail if the server goes on with an answer whose client has left."""
    for _ in range(100):
        with urllib.request.urlopen(URL.removesuffix("/v1") + "/healthz") as reply:
            if not json.load(reply)["running"]:
                return
        time.sleep(0.1)
    raise AssertionError("the answer goes on")
