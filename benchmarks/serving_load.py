"""Many clients at one server: requests lost, seconds waited, memory over the run.

    python benchmarks/serving_load.py /work/runs/eight/experts --out serving.json

`phatgoose serve` runs in a process of its own. First some requests are sent one at a time, then all
of them by so many clients at once, each with the next request as soon as its last one is answered.
Every prompt is another one. Requests, answers, seconds and the server's memory are written down;
`--smoke` does the same in seconds with a tiny model. Sampling is greedy, and the answers to the
requests that were sent both ways are compared: they may differ where bfloat16 rounds differently in
a batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai

ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    "river stone lantern winter garden copper violin harbour meadow engine letter pepper saddle "
    "mirror thunder basket velvet compass orchard feather canyon button whistle marble ribbon"
).split()
SAMPLING = 0.25  # seconds between two looks at the server's memory


@dataclass(frozen=True)
class Answered:
    """One request: when it was sent, how long it took, and what came (None: nothing)."""

    number: int
    begun: float
    seconds: float
    text: str | None
    tokens: int
    error: str | None = None


def prompt_of(number: int) -> str:
    """A prompt unlike all others, of 20 to 40 tokens."""
    words = [WORDS[(number * 7 + i * (1 + number // 25)) % len(WORDS)] for i in range(12)]
    return f"Question {number}: which of {', '.join(words[: 6 + number % 7])} is heavy?"


async def ask(
    client: openai.AsyncOpenAI, model: str, number: int, tokens: int, since: float
) -> Answered:
    """The answer to one request; whatever goes wrong is written down."""
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
    """All requests of `numbers`, by so many clients at once."""
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


class Memory:
    """The server's resident bytes, looked at again and again."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()
        self.seen: list[tuple[float, int]] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self) -> int:
        """Resident bytes."""
        (line,) = [x for x in self._status.read_text().splitlines() if x.startswith("VmRSS")]
        return int(line.split()[1]) * 1024

    def _watch(self) -> None:
        begun = time.perf_counter()
        while not self._over.wait(SAMPLING):
            self.seen.append((time.perf_counter() - begun, self.now()))

    def stop(self) -> list[int]:
        """The greatest number of each tenth of the time watched, in MiB."""
        self._over.set()
        self._thread.join()
        tenth = max(1, len(self.seen) // 10)
        tenths = [self.seen[i : i + tenth] for i in range(0, len(self.seen), tenth)][:10]
        return [max(size for _, size in part) >> 20 for part in tenths]


@contextmanager
def server(
    places: list[str],
    threads: int | None,
    keys: Sequence[str] = (),
    log: Path | None = None,
    files: int | None = None,
) -> Iterator[tuple[str, int]]:
    """(address, process id) of `phatgoose serve` in a process of its own.

    It lets in those who have one of `keys`, if there are any, writes what it says to `log` (None:
    where we do), and begins with a limit of so many open `files` (None: ours).
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if keys:
        environment["PHATGOOSE_API_KEYS"] = ",".join(keys)
    command = [sys.executable, "-m", "phatgoose", "serve", *places, "--port", str(port)]
    if files:
        command = ["bash", "-c", f'ulimit -Sn {files} && exec "$@"', "serve", *command]
    with open(log, "a") if log else nullcontext() as written:
        process = subprocess.Popen(command, env=environment, stderr=written)
    address = f"http://127.0.0.1:{port}"
    try:
        while not is_well(address):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}")
            time.sleep(0.2)
        yield address, process.pid
    finally:
        process.terminate()
        if process.wait(60) != 0:
            raise SystemExit(f"the server ended with {process.returncode}")


def is_well(address: str) -> bool:
    """True once the server answers."""
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def measure(
    place: str, clients: int, requests: int, alone: int, tokens: int, threads: int | None
) -> dict[str, Any]:
    """Everything that is found, ready to be written down."""
    with server([f"pool={place}"], threads) as (address, pid):
        asyncio.run(load(address, "pool", range(requests, requests + 2), 1, tokens))  # warm
        single = asyncio.run(load(address, "pool", range(alone), 1, tokens))
        memory = Memory(pid)
        before = memory.now()
        many = asyncio.run(load(address, "pool", range(requests), clients, tokens))
        tenths = memory.stop()
    one, all_ = summary(single), summary(many)
    texts = {each.number: each.text for each in many}
    same = sum(texts[each.number] == each.text for each in single)
    return {
        "pool": place,
        "clients": clients,
        "tokens_each": tokens,
        "one_at_a_time": one,
        "at_once": all_,
        "speedup": round(all_["tokens_per_second"] / one["tokens_per_second"], 2),
        "same_answers": f"{same} of {alone}",
        "memory_mib": {"before": before >> 20, "tenths": tenths},
        "answered": [asdict(each) for each in sorted(many, key=lambda each: each.number)],
    }


def machine() -> dict[str, Any]:
    """What it ran on."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return {
        "commit": commit.stdout.strip(),
        "cpu": names[0].partition(": ")[2] if names else platform.processor(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def tiny_pool(folder: Path) -> str:
    """A pool of eight random experts on a tiny base, in `folder`."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from phatgoose.base.loading import load_base
    from tiny import make_model, make_tokenizer, write_expert

    make_model("llama").save_pretrained(folder / "base")
    make_tokenizer(final_eos=False).save_pretrained(folder / "base")
    base = load_base(folder / "base", dtype="float32")
    for z in range(8):
        write_expert(base, folder, f"e{z}", seed=z)
    return str(folder / "experts")


def main() -> None:
    """Measure, print the summary, write everything down."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pool", nargs="?", help="a pool; not needed with --smoke")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=40, help="requests sent one at a time")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of every answer")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of the server")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, few requests")
    parser.add_argument("--out", type=Path, help="write everything to this JSON file")
    given = parser.parse_args()
    if not (given.pool or given.smoke):
        parser.error("name a pool, or say --smoke")
    with tempfile.TemporaryDirectory() as folder:
        place = tiny_pool(Path(folder)) if given.smoke else given.pool
        sizes = (
            (8, 40, 5, 6)
            if given.smoke
            else (given.clients, given.requests, given.alone, given.tokens)
        )
        found = {**machine(), **measure(place, *sizes, given.threads)}
    print(json.dumps({k: v for k, v in found.items() if k != "answered"}, indent=2))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if found["at_once"]["lost"]:
        sys.exit(f"{found['at_once']['lost']} requests were lost")


if __name__ == "__main__":
    main()
