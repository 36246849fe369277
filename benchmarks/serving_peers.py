"""`phatgoose serve` beside `transformers serve`, on one base: tokens a second and the first token.

    python benchmarks/serving_peers.py EXPERTS --out peers.json [--vllm .venv-vllm/bin/python]

Servers are each alone in their own process, in turns: transformers' with continuous batching, ours
of the base, and ours of the routed pool. With `--vllm`, the Python of vLLM's environment, they are
vLLM and ours, of the base, of one LoRA, and of the routed pool (by our plugin). One client, and
then eight at once, send greedy streaming requests; a client sends its next one when the last one
has ended. Prompts differ, and are texts to go on with, so that hardly an answer of transformers'
ends early; the others are told not to. Tokens are those that the server counts (some have no text),
and those of the texts that came from transformers'.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openai

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from bench import write_base
from engines import vllm_server
from phatgoose.base import load_base
from phatgoose.experts.pool import Pool
from report import circumstances
from server_process import ROOT, arguments, prompt_of, running, served_pool, server, write

CLIENTS = (1, 8)
OURS = "base"  # the name of our models
THREADS = 2
TELL = "Here is a long and detailed story. {} Nobody knew. One morning,"


@dataclass(frozen=True)
class Answer:
    """The seconds until a request's first text, or its end where none came, and the text.

    `tokens` is how many the server says it made, where it does.
    """

    first: float
    text: str
    tokens: int | None


def main() -> None:
    """Measure and write."""
    parser = arguments(__doc__)
    parser.add_argument("--vllm", metavar="PYTHON", help="of vLLM's environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=24, help="of eight clients; of one a third")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    given = parser.parse_args()
    rounds, requests, tokens = (
        (1, 8, 4) if given.smoke else (given.rounds, given.requests, given.tokens)
    )
    found: dict[str, list[dict[str, float]]] = {}
    with served_pool(parser, given) as pool, tempfile.TemporaryDirectory() as work:
        base = load_base(Pool.open(pool).base.id)
        folder = write_base(base, Path(work) / "base")
        servers: dict[str, Callable[[], AbstractContextManager[str]]] = {
            "phatgoose serve, base": partial(_ours, f"{OURS}={folder}"),
            "phatgoose serve, routed": partial(_ours, f"{OURS}={pool}?router=phatgoose"),
        }
        one = Pool.open(pool).experts[0]
        models = {"transformers serve": folder, "vllm serve, one": one.directory.name}
        if given.vllm:
            vllm = partial(_vllm, given.vllm, Path(folder), Path(work))
            servers |= {
                "phatgoose serve, one": partial(_ours, f"{OURS}={one.directory}?router=single"),
                "vllm serve, base": partial(vllm),
                "vllm serve, one": partial(vllm, adapter=one.directory),
                "vllm serve, routed": partial(vllm, routed=Path(pool)),
            }
        else:
            servers["transformers serve"] = partial(_theirs, folder)
        for _ in range(rounds):
            for name, start in servers.items():
                with start() as address:
                    model = models.get(name, OURS)
                    once = asyncio.run(_round(address, model, requests, tokens, base.tokenizer))
                    found.setdefault(name, []).append(once)
    medians = {
        name: {key: statistics.median(once[key] for once in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    write({**circumstances(), "medians": medians, "rounds": found}, given.out, "rounds")


async def _round(
    address: str, model: str, requests: int, tokens: int, tokenizer: Any
) -> dict[str, float]:
    """Of one server, by number of clients: tokens a second, median seconds to the first one."""
    found = {}
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="-", timeout=600) as client:
        await _ask(client, model, 0, 2)  # whatever is done at the first request
        for clients in CLIENTS:
            numbers = iter(range(1, 1 + (requests if clients > 1 else max(1, requests // 3))))
            answers: list[Answer] = []

            async def work(numbers: Iterator[int] = numbers, into: list[Answer] = answers) -> None:
                for number in numbers:
                    into.append(await _ask(client, model, number, tokens))

            begun = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(clients)))
            seconds = time.perf_counter() - begun
            made = sum(each.tokens or len(tokenizer(each.text)["input_ids"]) for each in answers)
            found[f"tokens a second, {clients} clients"] = made / seconds
            found[f"seconds to the first token, {clients} clients"] = statistics.median(
                each.first for each in answers
            )
    return found


async def _ask(client: openai.AsyncOpenAI, model: str, number: int, tokens: int) -> Answer:
    """A streamed answer to one request."""
    begun, first, parts, made = time.perf_counter(), 0.0, list[str](), None
    more: dict[str, Any] = {}
    if not Path(model).is_dir():  # transformers' server knows neither
        more = {"stream_options": {"include_usage": True}, "extra_body": {"ignore_eos": True}}
    stream = await client.completions.create(
        model=model,
        prompt=TELL.format(prompt_of(number)),
        max_tokens=tokens,
        temperature=0,
        stream=True,
        **more,
    )
    async for chunk in stream:
        made = chunk.usage.completion_tokens if chunk.usage else made
        if chunk.choices and chunk.choices[0].text:
            first = first or time.perf_counter() - begun
            parts.append(chunk.choices[0].text)
    return Answer(first or time.perf_counter() - begun, "".join(parts), made)


@contextmanager
def _ours(place: str) -> Iterator[str]:
    with server([place, "--dtype", "float32"], threads=THREADS) as (address, _):
        yield address


@contextmanager
def _vllm(
    python: str, base: Path, work: Path, adapter: Path | None = None, routed: Path | None = None
) -> Iterator[str]:
    """The address of `vllm serve`, of the base alone, with one LoRA or routed by our plugin."""
    adapters = [adapter] if adapter else None
    more = {"routed": routed, "adapters": adapters, "python": python, "threads": THREADS}
    engine = vllm_server(base, work / "vllm.log", name=OURS, **more)
    engine.start()
    try:
        yield engine.url
    finally:
        engine.kill()


@contextmanager
def _theirs(folder: str) -> Iterator[str]:
    """The address of `transformers serve` of the base in `folder`."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder]
    command += ["--continuous-batching", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": str(THREADS)}
    with running(command, environment, health="health") as (address, _):
        yield address


if __name__ == "__main__":
    main()
