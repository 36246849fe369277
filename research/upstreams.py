"""Many adapters on engines behind the gateway, compared with naming the adapter to the engine.

    PYTHONPATH=benchmarks:tests/support python research/upstreams.py 2      # engines

1,000 adapters are registered at each engine, a stand-in with vLLM's API. It keeps the 32 that were
used last in memory; another one costs LOAD seconds, one at a time. Each answer takes ANSWER seconds
more. Requests name adapters by Zipf's law, so that no router is in the ratio. The direct client has
a fixed assignment of adapters to engines that makes their shares equal, which it knows beforehand.
Both ways alternate; numbers are medians of rounds.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI, Request

from phatgoose.base.loading import load_base
from server_process import running
from synthetic import tiny_base
from tiny import write_expert

NAMES = [f"e{z:04}" for z in range(1000)]
SHARES = [1 / (rank + 1) for rank in range(len(NAMES))]
RESIDENT, LOAD, ANSWER = 32, 0.05, 0.5
ROUNDS, REQUESTS, CLIENTS = 3, 600, (8, 32)


def stand_in(port: int) -> None:
    """An engine at `port`."""
    app, resident, loading = FastAPI(), OrderedDict[str, None](), asyncio.Lock()
    counts = {"loads": 0}

    @app.get("/{path:path}")
    async def about(path: str) -> Any:
        cards = [{"id": name, "parent": "base", "owned_by": "vllm"} for name in NAMES]
        return {"data": [{"id": "base", "owned_by": "vllm"}, *cards], **counts}

    @app.post("/v1/completions")
    async def answer(request: Request) -> Any:
        name = (await request.json())["model"]
        if name not in resident:
            async with loading:
                if name not in resident:
                    counts["loads"] += 1
                    await asyncio.sleep(LOAD)
                    resident[name] = None
        resident[name] = resident.pop(name, None)
        while len(resident) > RESIDENT:
            resident.popitem(last=False)
        await asyncio.sleep(ANSWER)
        return {"choices": [{"index": 0, "text": name, "finish_reason": "stop"}]}

    uvicorn.run(app, port=port, log_level="error")


async def measured(addresses: list[str], clients: int, seed: int) -> list[float]:
    """The seconds that each request takes, after the first tenth; a prompt's engine is fixed."""
    totals, places, took = [0.0] * len(addresses), dict[str, str](), list[float]()
    for name, share in zip(NAMES, SHARES, strict=True):
        least = totals.index(min(totals))
        places[name], totals[least] = addresses[least], totals[least] + share
    names = iter(random.Random(seed).choices(NAMES, SHARES, k=REQUESTS))

    async def one(client: httpx2.AsyncClient) -> None:
        for name in names:
            begun, body = time.perf_counter(), {"model": name, "prompt": "a", "max_tokens": 1}
            reply = await client.post(f"{places[name]}/v1/completions", json=body)
            assert reply.json()["choices"][0]["text"] == name, reply.text
            took.append(time.perf_counter() - begun)

    async with httpx2.AsyncClient(timeout=60) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return took[REQUESTS // 10 :]


def main() -> None:
    """Print p50, p95 and the share of requests that load an adapter, for each number of clients."""
    *_, before_last, last = sys.argv
    if before_last == "--port":
        stand_in(int(last))
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = load_base(tiny_base(folder / "base"), dtype="float32")
        for seed, name in enumerate(NAMES):
            write_expert(base, folder, name, seed=seed)

        def started(*command: str) -> str:
            return stack.enter_context(running([sys.executable, *command], os.environ))[0]

        engines = [started(__file__) for _ in range(int(last))]
        upstreams = [part for each in engines for part in ("--upstream", each)]
        gateway = started("-m", "phatgoose", "serve", str(folder / "experts"), *upstreams)
        ways = {"direct": engines, "gateway": [gateway] * len(engines)}
        for clients in CLIENTS:
            rows: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
            for seed in range(ROUNDS):
                for way, addresses in ways.items():
                    before = loads_of(engines)
                    cuts = statistics.quantiles(
                        asyncio.run(measured(addresses, clients, seed)), n=100
                    )
                    rows[way].append((cuts[49], cuts[94], (loads_of(engines) - before) / REQUESTS))
            for way, row in rows.items():
                p50, p95, share = map(statistics.median, zip(*row, strict=True))
                print(f"{clients} {way}: p50 {p50:.3f} p95 {p95:.3f} loads {share:.0%}", flush=True)


def loads_of(engines: list[str]) -> int:
    return sum(httpx2.get(engine).json()["loads"] for engine in engines)


if __name__ == "__main__":
    main()
