"""Many clients at one server: requests lost, seconds waited, memory over the run.

    python benchmarks/serving_load.py EXPERTS --out serving.json

`phatgoose serve` runs in its own process. First some requests are sent one at a time, then all of
them by many clients at once; each client sends its next request as soon as the last one is
answered. All prompts differ. The JSON file has requests, answers, seconds and the server's memory;
`--smoke` does the same in seconds with a tiny model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai

from report import PROJECT, circumstances
from server_process import Memory, prompt_of, running
from synthetic import tiny_pool


@dataclass(frozen=True)
class Answered:
    """One request: when it was sent, how long it took, and its answer (None: none came)."""

    number: int
    begun: float
    seconds: float
    text: str | None
    tokens: int
    error: str | None = None


async def ask(
    client: openai.AsyncOpenAI, model: str, number: int, tokens: int, since: float
) -> Answered:
    """The answer to one request, or its error."""
    begun = time.perf_counter()
    try:
        reply = await client.completions.create(
            model=model,
            prompt=prompt_of(number),
            max_tokens=tokens,
            temperature=0,
            extra_body={"ignore_eos": True},  # experts of short answers would hardly decode
        )
    except openai.OpenAIError as error:
        seconds = time.perf_counter() - begun
        return Answered(number, begun - since, seconds, None, 0, repr(error))
    seconds = time.perf_counter() - begun
    made = reply.usage.completion_tokens if reply.usage else 0
    return Answered(number, begun - since, seconds, reply.choices[0].text, made)


async def load(
    address: str, model: str, numbers: range, clients: int, tokens: int
) -> list[Answered]:
    """All requests of `numbers`, sent by so many clients at once."""
    since = time.perf_counter()
    waiting = iter(numbers)
    answered: list[Answered] = []

    async def one(client: openai.AsyncOpenAI) -> None:
        for number in waiting:
            answered.append(await ask(client, model, number, tokens, since))

    async with openai.AsyncOpenAI(
        base_url=f"{address}/v1", api_key="-", max_retries=0, timeout=600
    ) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return answered


def summary(answered: list[Answered]) -> dict[str, Any]:
    """Counts, percentiles of the seconds, and tokens a second."""
    good = [each for each in answered if each.text is not None]
    seconds = sorted(each.seconds for each in good)
    wall = max(each.begun + each.seconds for each in answered)
    cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else [seconds[0]] * 99
    return {
        "requests": len(answered),
        "lost": len(answered) - len(good),
        "errors": sorted({each.error for each in answered if each.error}),
        "seconds": round(wall, 2),
        "p50": round(cuts[49], 3),
        "p95": round(cuts[94], 3),
        "longest": round(seconds[-1], 3),
        "tokens": sum(each.tokens for each in good),
        "tokens_per_second": round(sum(each.tokens for each in good) / wall, 2),
        "requests_per_second": round(len(good) / wall, 3),
    }


def measure(
    place: str, clients: int, requests: int, alone: int, tokens: int, threads: int | None
) -> dict[str, Any]:
    """All results, ready for JSON."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "phatgoose", "serve", f"pool={place}?router=phatgoose"]
    with running(command, environment) as (address, process):
        asyncio.run(load(address, "pool", range(requests, requests + 2), 1, tokens))  # warm
        single = asyncio.run(load(address, "pool", range(alone), 1, tokens))
        memory = Memory(process.pid)
        before = memory.now()
        many = asyncio.run(load(address, "pool", range(requests), clients, tokens))
        tenths = memory.stop()
    if process.returncode != 0:
        raise SystemExit(f"the server ended with {process.returncode}")
    one, all_ = summary(single), summary(many)
    return {
        "pool": place,
        "clients": clients,
        "tokens_each": tokens,
        "one_at_a_time": one,
        "at_once": all_,
        "speedup": round(all_["tokens_per_second"] / one["tokens_per_second"], 2),
        "memory_mib": {"before": before >> 20, "tenths": tenths},
        "answered": [asdict(each) for each in sorted(many, key=lambda each: each.number)],
    }


def main() -> None:
    """Measure, print the summary, write everything to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pool", nargs="?", help="a pool; not needed with --smoke")
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--out", type=Path, help="write everything to this JSON file")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=40, help="requests sent one at a time")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of every answer")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of the server")
    given = parser.parse_args()
    if not (given.pool or given.smoke):
        parser.error("name a pool, or say --smoke")
    sizes = (given.clients, given.requests, given.alone, given.tokens)
    sizes = (8, 40, 5, 6) if given.smoke else sizes
    with tempfile.TemporaryDirectory() as folder:
        place = tiny_pool(Path(folder)) if given.smoke else given.pool
        found = {**circumstances(), **measure(place, *sizes, given.threads)}
    print(json.dumps({key: value for key, value in found.items() if key != "answered"}, indent=2))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if found["at_once"]["lost"]:
        sys.exit(f"{found['at_once']['lost']} requests were lost")


if __name__ == "__main__":
    main()
