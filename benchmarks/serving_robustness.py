"""Hostile and greedy clients at one server: whether it stays responsive, and who waits for whom.

    python benchmarks/serving_robustness.py --smoke          # a tiny model, a minute
    python benchmarks/serving_robustness.py POOL --out doors.json

`phatgoose serve` runs in its own process; everything is sent to 127.0.0.1. It gets bodies of 1 MiB
that are costly to parse, a client that asks for 16 answers of 1,000 tokens again and again beside
others that ask for one of 16, chats with bases whose templates take all time or memory, and SIGTERM
while 20 answers stream and such templates run. Meanwhile /healthz is polled.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from report import circumstances
from server_process import Memory, arguments, prompt_of, served_pool, server, tiny_base, write

MIB = 1 << 20
KEYS = ["greedy", *(f"polite{number}" for number in range(4))]
TEMPLATES = {  # of bases that may not stop the server
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{% set a = 9 %}{{ a ** (a ** a) }}",
    "doubled": (
        "{% set x = namespace(y='a' * 999) %}{% for i in range(60) %}{% set x.y = x.y + x.y %}"
        "{% endfor %}{{ x.y | length }}"
    ),
}
PROMPTLY = 20  # seconds for a process to end after its last stream
GIVE_UP = 90  # seconds after which a silent server is called dead


def request_of(body: bytes, key: str = KEYS[0], kind: str = "completions") -> bytes:
    """A request's bytes."""
    head = (
        f"POST /v1/{kind} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def hostile_bodies() -> dict[str, bytes]:
    """Bodies of nearly 1 MiB, each costly in another way, by name."""

    def filled(before: bytes, piece: bytes, after: bytes) -> bytes:
        room = (MIB - len(before) - len(after) - 8) // (len(piece) + 1)
        return before + b",".join([piece] * room) + after

    prompt = b'{"model": "pool", "prompt": ['
    messages = b'{"model": "pool", "messages": ['
    numbered = ",".join(f'"x{number}": 1' for number in range(70_000)).encode()
    return {
        "objects": filled(prompt, b"{}", b"]}"),
        "lists": filled(prompt, b"[]", b"]}"),
        "texts": filled(prompt, b'""', b"]}"),
        "tokens": filled(prompt, b"1", b"]}"),
        "lists of tokens": filled(prompt, b"[1]", b"]}"),
        "messages": filled(messages, b'{"role":"user","content":"a"}', b"]}"),
        "deep": b"[" * (MIB - 8),
        "fields": b'{"model": "pool", ' + numbered + b"}",
        "digits": b'{"model": "pool", "seed": ' + b"9" * (MIB - 40) + b"}",
        "one text": b'{"model": "pool", "prompt": "' + b"a" * (MIB - 40) + b'"}',
        "words": b'{"model": "pool", "prompt": "' + b"a b " * ((MIB - 40) // 4) + b'"}',
        "stops": b'{"model": "pool", "prompt": "a", "stop": "' + b"s" * (MIB - 60) + b'"}',
    }


@contextmanager
def probed(address: str) -> Iterator[dict[str, Any]]:
    """How /healthz answers, asked ten times a second on new connections, in an open context."""
    found: dict[str, Any] = {"asked": 0, "failed": 0, "longest": 0.0}
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.1):
            begun = time.perf_counter()
            found["asked"] += 1
            try:
                urllib.request.urlopen(f"{address}/healthz", timeout=GIVE_UP).read()
            except OSError:
                found["failed"] += 1
            found["longest"] = max(found["longest"], round(time.perf_counter() - begun, 3))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def exchange(
    address: str, content: bytes, key: str = KEYS[0], kind: str = "completions"
) -> tuple[int, int]:
    """(status, bytes of the answer) to a request; status 0 if the connection broke."""
    with socket.create_connection(place_of(address), timeout=GIVE_UP) as sock:
        with suppress(OSError):
            sock.sendall(request_of(content, key, kind))
        reply = http.client.HTTPResponse(sock)
        try:
            reply.begin()
            return reply.status, len(reply.read())
        except (OSError, http.client.HTTPException):
            return 0, 0


def place_of(address: str) -> tuple[str, int]:
    """Host and port."""
    parts = urlsplit(address)
    return str(parts.hostname), int(parts.port or 80)


def bodies(address: str, pid: int) -> dict[str, Any]:
    """Each hostile body four times, two at once."""
    found: dict[str, Any] = {}
    for name, body in hostile_bodies().items():
        memory, begun = Memory(pid), time.perf_counter()
        before = memory.now()
        answers: list[tuple[int, int]] = []

        def twice(body: bytes = body, answers: list[tuple[int, int]] = answers) -> None:
            answers.extend(exchange(address, body) for _ in range(2))

        with probed(address) as healthz:
            at_once([twice, twice])
            time.sleep(0.25)
        most = max(memory.stop())
        found[name] = {
            "statuses": sorted({status for status, _ in answers}),
            "longest_answer": max(size for _, size in answers),
            "seconds": round(time.perf_counter() - begun, 2),
            "healthz": healthz,
            "mib_more": max(0, most - (before >> 20)),
        }
    return found


def hostile_chat(name: str) -> bytes:
    """A chat's body for the base with that template."""
    messages = [{"role": "user", "content": "a"}]
    return json.dumps({"model": name, "messages": messages, "max_tokens": 1}).encode()


def templates(address: str, pid: int) -> dict[str, Any]:
    """Two chats with each hostile base, while another client asks the pool."""
    memory = Memory(pid)
    before = memory.now()
    answers: dict[str, list[int]] = {name: [] for name in TEMPLATES}
    asking = threading.Event()
    waits: list[float] = []
    lost: list[int] = []

    def chat(name: str) -> None:
        answers[name].append(exchange(address, hostile_chat(name), kind="chat/completions")[0])

    def polite() -> None:
        while not asking.wait(0.1):
            begun = time.perf_counter()
            body = json.dumps({"model": "pool", "prompt": "a", "max_tokens": 1}).encode()
            status, _ = exchange(address, body, KEYS[1])
            waits.append(time.perf_counter() - begun)
            if status != 200:
                lost.append(status)

    with probed(address) as healthz:
        asker = threading.Thread(target=polite)
        asker.start()
        begun = time.perf_counter()
        at_once([lambda name=name: chat(name) for name in [*TEMPLATES, *TEMPLATES]])
        seconds = time.perf_counter() - begun
        asking.set()
        asker.join()
    return {
        "statuses": answers,
        "seconds": round(seconds, 2),
        "asked_meanwhile": len(waits),
        "lost": lost,
        "longest_wait": round(max(waits, default=0.0), 3),
        "healthz": healthz,
        "mib_more": max(0, max(memory.stop()) - (before >> 20)),
    }


def at_once(works: list[Callable[[], None]]) -> None:
    """Run all of `works`, each in a thread."""
    with ThreadPoolExecutor(len(works)) as threads:
        for done in [threads.submit(work) for work in works]:
            done.result()


async def polite_ones(address: str, rounds: int, greedy: int | None = None) -> dict[str, Any]:
    """Four clients' waits, while another asks for 16 answers of `greedy` tokens at a time."""
    waits: list[float] = []
    lost: list[str] = []
    made = 0

    def client_of(key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=600)

    async def ask(client: openai.AsyncOpenAI, number: int, n: int, tokens: int) -> None:
        nonlocal made
        stream = await client.completions.create(
            model="pool",
            prompt=prompt_of(number),
            n=n,
            max_tokens=tokens,
            temperature=1,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for _ in stream:
            made += n > 1

    async def polite(key: str) -> None:
        async with client_of(key) as client:
            for number in range(rounds):
                begun = time.perf_counter()
                try:
                    await ask(client, number, 1, 16)
                except openai.OpenAIError as error:
                    lost.append(repr(error))
                waits.append(time.perf_counter() - begun)

    async def takes_all(tokens: int) -> None:
        async with client_of(KEYS[0]) as client:
            while True:
                await ask(client, 99, 16, tokens)

    begun = time.perf_counter()
    takers = [asyncio.create_task(takes_all(greedy)) for _ in range(2)] if greedy else []
    await asyncio.sleep(1 if greedy else 0)  # the greedy one comes first
    await asyncio.gather(*(polite(key) for key in KEYS[1:]))
    seconds = time.perf_counter() - begun
    for taker in takers:
        taker.cancel()
    await asyncio.gather(*takers, return_exceptions=True)
    return {
        "requests": len(waits),
        "lost": lost,
        "median": round(statistics.median(waits), 3),
        "longest": round(max(waits), 3),
        "greedy_tokens_per_second": round(made / seconds, 1),
    }


def stopped_at_work(address: str, pid: int, number: int = 20) -> dict[str, Any]:
    """Send SIGTERM while `number` answers stream and two templates run for ever.

    Counts how many streams were finished, and the seconds until the process had ended.
    """
    streams, ready = [0] * number, threading.Barrier(number + 1)
    body = {"model": "pool", "prompt": "a", "max_tokens": 200, "stream": True, "ignore_eos": True}

    def stream(which: int) -> None:
        host, port = place_of(address)
        connection = http.client.HTTPConnection(host, port, timeout=GIVE_UP)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEYS[1]}"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        first = reply.readline()
        ready.wait()
        streams[which] = int(b"[DONE]" in first + reply.read())

    def signalled() -> None:
        ready.wait()
        os.kill(pid, signal.SIGTERM)

    for name in ("loops", "power"):
        body_of = hostile_chat(name)
        send = partial(exchange, address, body_of, kind="chat/completions")
        threading.Thread(target=send, daemon=True).start()
    at_once([*(lambda which=which: stream(which) for which in range(number)), signalled])
    begun = time.perf_counter()
    while Path(f"/proc/{pid}").exists() and not is_zombie(pid):
        time.sleep(0.1)
    ended = round(time.perf_counter() - begun, 1)
    return {"streams": number, "finished": sum(streams), "ended_after": ended}


def is_zombie(pid: int) -> bool:
    """True when the process has ended and its parent hasn't asked yet."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def measure(place: str, greedy: int, rounds: int) -> dict[str, Any]:
    """All results, ready for JSON."""
    with tempfile.TemporaryDirectory() as folder:
        places = [f"pool={place}?router=phatgoose"]
        for name, template in TEMPLATES.items():
            places.append(f"{name}={tiny_base(Path(folder) / name, template)}")
        with server(places, None, KEYS, Path(folder) / "server.log") as (address, pid):
            return {
                "alone": asyncio.run(polite_ones(address, rounds)),
                "beside a greedy client": asyncio.run(polite_ones(address, rounds, greedy)),
                "bodies": bodies(address, pid),
                "templates": templates(address, pid),
                "sigterm": stopped_at_work(address, pid),
            }


def faults(found: dict[str, Any]) -> list[str]:
    """What must not happen on any machine."""
    streams, hostile = found["sigterm"], found["templates"]
    asked = {**found["bodies"], "hostile templates": hostile}
    wrong = [f"/healthz failed beside {n}" for n, got in asked.items() if got["healthz"]["failed"]]
    for kind in ("alone", "beside a greedy client"):
        wrong += [f"a polite client's request was lost {kind}: {e}" for e in found[kind]["lost"]]
    if streams["finished"] < streams["streams"]:
        wrong.append(f"{streams['finished']} of {streams['streams']} streams were finished")
    if streams["ended_after"] > PROMPTLY:
        wrong.append(f"the process ended {streams['ended_after']} seconds after the streams")
    for name, statuses in hostile["statuses"].items():
        if set(statuses) != {400}:
            wrong.append(f"a chat with base {name} was answered with {statuses}")
    if hostile["lost"] or not hostile["asked_meanwhile"]:
        wrong.append(f"requests beside hostile templates were lost: {hostile['lost']}")
    return wrong


def main() -> None:
    """Measure, print, write everything to a file."""
    parser = arguments(__doc__)
    parser.add_argument("--greedy", type=int, default=1000, help="tokens of a greedy answer")
    parser.add_argument("--rounds", type=int, default=8, help="requests of each polite client")
    given = parser.parse_args()
    with served_pool(parser, given) as place:
        found = measure(place, given.greedy, given.rounds)
    write({**circumstances(), **found}, given.out)
    if wrong := faults(found):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
