"""What the gateway's choice adds to an answer, and what the gateway takes to start and to hold.

    python benchmarks/gateway_latency.py [--clients 8] [--answer 1.0] [--requests 80] [--rounds 3]

The pool is names and prompts alone: hand 1's skills, three prompts each (people/README.md). The
engine is a stand-in of this file's in a process of its own, which answers whatever adapter is
named, after --answer seconds. Hand 2's prompts go to the gateway, which chooses for each, and to
the engine with an adapter named, in turns; no prompt comes twice. Printed are medians of rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from argparse import RawTextHelpFormatter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI

from people import drawn
from people_cases import load_hand
from server_process import Memory, running

SKILLS = 24
PROMPTS = 3


def stand_in(port: int, seconds: float, names: list[str]) -> None:
    """An engine at `port` with vLLM's API, which has adapters of all `names`."""
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> Any:
        cards = [{"id": name, "parent": "base", "owned_by": "vllm"} for name in names]
        return {"data": [{"id": "base", "owned_by": "vllm"}, *cards]}

    @app.get("/{path:path}")
    async def others(path: str) -> Any:
        return {}

    @app.post("/v1/chat/completions")
    async def answer(body: dict[str, Any]) -> Any:
        await asyncio.sleep(seconds)
        message = {"role": "assistant", "content": body["model"]}
        return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}

    uvicorn.run(app, port=port, log_level="error")


async def took(address: str, model: str, prompts: list[str], clients: int) -> list[float]:
    """The seconds that each prompt's answer takes."""
    left = iter(prompts)
    seconds = list[float]()

    async def one(client: httpx2.AsyncClient) -> None:
        for prompt in left:
            messages = [{"role": "user", "content": prompt}]
            body = {"model": model, "messages": messages, "max_tokens": 1}
            begun = time.perf_counter()
            reply = await client.post(f"{address}/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            seconds.append(time.perf_counter() - begun)

    async with httpx2.AsyncClient(timeout=60) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--answer", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, help="be the engine")
    given = parser.parse_args()
    pool = drawn(load_hand(1), SKILLS, PROMPTS, 0)
    names = list(pool)
    if given.port:
        stand_in(given.port, given.answer, names)
        return
    texts = [text for skill in load_hand(2).skills.values() for text in skill["prompts"]]
    random.Random(0).shuffle(texts)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        table = folder / "pool.toml"
        rows = []
        for name, prompts in pool.items():
            listed = json.dumps(prompts, ensure_ascii=False)  # JSON's texts are TOML's too
            rows.append(f"[experts.{json.dumps(name)}]\nprompts = {listed}\n")
        table.write_text("".join(rows), encoding="utf-8")

        def started(*command: str) -> tuple[str, Any]:
            return stack.enter_context(running([sys.executable, *command], os.environ))

        engine, _ = started(__file__, "--answer", str(given.answer))
        begun = time.perf_counter()
        serve = ("-m", "phatgoose", "serve", f"goose={table}", "--upstream", engine)
        gateway, process = started(*serve)
        print(f"started in {time.perf_counter() - begun:.1f} s", flush=True)
        memory = Memory(process.pid)
        ratios = []
        for number in range(given.rounds):
            at = number * given.requests
            prompts = texts[at : at + given.requests]
            p95 = {}
            for way, address, model in (
                ("direct", engine, names[0]),
                ("gateway", gateway, "goose"),
            ):
                seconds = asyncio.run(took(address, model, prompts, given.clients))
                cuts = statistics.quantiles(seconds, n=100)
                p95[way] = cuts[94]
                print(f"{way}: p50 {cuts[49]:.3f} p95 {cuts[94]:.3f}", flush=True)
            ratios.append(p95["gateway"] / p95["direct"])
        highest = max(memory.stop())
        ratio = statistics.median(ratios)
        print(f"{given.clients} clients, answers of {given.answer} s: p95 x {ratio:.2f}")
        print(f"resident at most {highest} MiB")


if __name__ == "__main__":
    main()
