"""The gateway's cost: an engine behind it, and the same engine told the adapter, in turns.

    python benchmarks/gateway.py demo/experts --out gateway.json [--vllm .venv-vllm/bin/python]

The engine is llama.cpp, by xllamacpp and its converters (docs/engines.md), or with `--vllm` the
vLLM of that Python. Engine, gateway and clients are processes of their own. Each client asks for
one answer after the other. The requests of a round are the same both ways, with the adapters that
the gateway chooses. It reports tokens per second, medians of the rounds, and how long choices took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import httpx2

from engines import Engine, free_port, llama_server, vllm_server
from phatgoose.apps import demo
from phatgoose.apps.deploy import deploy
from phatgoose.base import smollm2_folder
from phatgoose.experts.pool import Pool
from phatgoose.routing.open_model import open_prompt_router

LIMIT = 0.06  # seconds for a choice


async def round_of(url: str, bodies: list[dict[str, Any]], clients: int) -> tuple[float, int, int]:
    """Seconds, tokens and lost requests when so many clients ask for `bodies` in turn."""
    left, tokens, lost = list(reversed(bodies)), 0, 0
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=600, trust_env=False, limits=limits) as client:

        async def one() -> None:
            nonlocal tokens, lost
            while left:
                reply = await client.post(f"{url}/v1/completions", json=left.pop())
                if reply.status_code == 200:
                    tokens += reply.json()["usage"]["completion_tokens"]
                else:
                    lost += 1

        begun = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        return time.perf_counter() - begun, tokens, lost


def choices(url: str) -> dict[str, float]:
    """How many choices there were, and how many of them took up to LIMIT seconds."""
    lines = httpx2.get(f"{url}/metrics", trust_env=False).text.splitlines()
    found = {}
    for line in lines:
        for name, key in ((f'bucket{{le="{LIMIT}"}}', "quick"), ("count", "all"), ("sum", "sum")):
            if line.startswith(f"phatgoose_choice_seconds_{name} "):
                found[key] = float(line.split()[-1])
    return found


def started(experts: Path, engine: str, router: str) -> tuple[subprocess.Popen[bytes], str]:
    port = free_port()
    command = [sys.executable, "-m", "phatgoose", "serve", str(experts), "--port", str(port)]
    command += ["--upstream", engine, "--router", router, "--k", "1", "--dtype", "float32"]
    gateway = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"
    while True:
        time.sleep(0.5)
        try:
            if httpx2.get(f"{url}/healthz", trust_env=False).status_code == 200:
                return gateway, url
        except httpx2.HTTPError:
            if gateway.poll() is not None:
                raise SystemExit("the gateway ended at its start") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experts", type=Path)
    parser.add_argument("--router", default="retrieval")
    parser.add_argument("--vllm", metavar="PYTHON", help="of vLLM's environment")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    pool = Pool.open(asked.experts)
    prompts = [row.input for task in demo.unseen_tasks(40) for row in task.test]
    chooser = open_prompt_router(pool, router=asked.router, k=1)
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(asked, pool, Path(folder))
        engine.start()
        gateway, url = started(asked.experts, engine.url, asked.router)
        try:
            rows = [
                measured(asked, clients, engine.url, url, prompts, chooser)
                for clients in asked.clients
            ]
        finally:
            gateway.terminate()
            gateway.wait()
            engine.kill()
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=2) + "\n")


def engine_of(asked: argparse.Namespace, pool: Pool, folder: Path) -> Engine:
    """The engine with all adapters."""
    if asked.vllm:
        adapters = [asked.experts / name for name in pool.names]
        return vllm_server(smollm2_folder(), folder / "log", adapters=adapters, python=asked.vllm)
    made = folder / "deploy"
    deploy(pool, "llama.cpp", made)
    subprocess.run([made / "convert.sh", "--outtype", "f32"], check=True)
    adapters = [made / "gguf" / f"{name}.gguf" for name in pool.names]
    return llama_server(made / "base.gguf", adapters, slots=asked.slots, context=512 * asked.slots)


def told(asked: argparse.Namespace, experts: tuple[str, ...], z: int) -> dict[str, Any]:
    """How a request names expert `z` to the engine."""
    if asked.vllm:
        return {"model": experts[z], "top_k": -1}
    scales = [{"id": i, "scale": float(i == z)} for i in range(len(experts))]
    return {"lora": scales, "top_k": 0, "min_p": 0.0}


def measured(
    asked: argparse.Namespace,
    clients: int,
    engine: str,
    gateway: str,
    prompts: list[str],
    chooser: Any,
) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {"engine": [], "gateway": []}
    before, lost = choices(gateway), 0
    for number in range(asked.rounds):
        chosen = [
            prompts[(number * asked.requests + i) % len(prompts)] for i in range(asked.requests)
        ]
        common = {"max_tokens": asked.tokens, "temperature": 0, "ignore_eos": True}
        experts = chooser.choose(chosen).experts[:, 0].tolist()
        named = [
            {**common, "prompt": prompt, **told(asked, chooser.experts, z)}
            for prompt, z in zip(chosen, experts, strict=True)
        ]
        bodies = [{**common, "model": "auto", "prompt": prompt} for prompt in chosen]
        ways = [("engine", engine, named), ("gateway", gateway, bodies)]
        for name, url, each in ways if number % 2 else reversed(ways):
            seconds, tokens, missed = asyncio.run(round_of(url, each, clients))
            speeds[name].append(tokens / seconds)
            lost += missed
    after = choices(gateway)
    count = after["all"] - before.get("all", 0)
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    row = {
        "clients": clients,
        "tokens_per_second": medians,
        "rounds": speeds,
        "ratio": medians["gateway"] / medians["engine"],
        "lost": lost,
        "choices": count,
        "choices_up_to_60_ms": (after["quick"] - before.get("quick", 0)) / count,
        "mean_choice_seconds": (after["sum"] - before.get("sum", 0)) / count,
    }
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
