"""`phatgoose serve` in its own process, and what both of its benchmarks need."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    "river stone lantern winter garden copper violin harbour meadow engine letter pepper saddle "
    "mirror thunder basket velvet compass orchard feather canyon button whistle marble ribbon"
).split()
SAMPLING = 0.25  # seconds between two samples of the server's memory


def prompt_of(number: int) -> str:
    """A prompt unlike all others, of 20 to 40 tokens."""
    words = [WORDS[(number * 7 + i * (1 + number // 25)) % len(WORDS)] for i in range(12)]
    return f"Question {number}: which of {', '.join(words[: 6 + number % 7])} is heavy?"


class Memory:
    """Samples the server's resident memory."""

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
        """The highest sample of each tenth of the time, in MiB."""
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
) -> Iterator[tuple[str, int]]:
    """(address, process id) of `phatgoose serve` in its own process.

    It requires one of `keys`, if there are any, and writes its log to `log` (None: our stderr).
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if keys:
        environment["PHATGOOSE_API_KEYS"] = ",".join(keys)
    command = [sys.executable, "-m", "phatgoose", "serve", *places]
    with running(command, environment, health="healthz", log=log) as (address, process):
        yield address, process.pid
    if process.returncode != 0:
        raise SystemExit(f"the server ended with {process.returncode}")


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], *, health: str, log: Path | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(address, process) of the server that `command --port PORT` starts, once it is well.

    `health` is the path that answers then.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with open(log, "a") if log else nullcontext() as written:
        process = subprocess.Popen([*command, "--port", str(port)], env=environment, stderr=written)
    address = f"http://127.0.0.1:{port}"
    try:
        while not is_well(address, health):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}")
            time.sleep(0.2)
        yield address, process
    finally:
        process.terminate()
        process.wait(60)


def is_well(address: str, health: str = "healthz") -> bool:
    """True once the server answers."""
    try:
        with urllib.request.urlopen(f"{address}/{health}", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def tiny_base(folder: Path, template: str | None = None) -> str:
    """A tiny base with random weights and a chat `template`, in `folder`."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tiny import make_model, make_tokenizer

    make_model("llama").save_pretrained(folder)
    tokenizer = make_tokenizer(final_eos=False)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_pool(folder: Path) -> str:
    """A pool of eight random experts on a tiny base, in `folder`."""
    tiny_base(folder / "base")
    from phatgoose.base import load_base
    from tiny import write_expert

    base = load_base(folder / "base", dtype="float32")
    for z in range(8):
        write_expert(base, folder, f"e{z}", seed=z)
    return str(folder / "experts")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser of the options that both benchmarks have."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("pool", nargs="?", help="a pool; not needed with --smoke")
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--out", type=Path, help="write everything to this JSON file")
    return parser


@contextmanager
def served_pool(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Iterator[str]:
    """The pool that the options name, or a tiny one."""
    if not (given.pool or given.smoke):
        parser.error("name a pool, or say --smoke")
    with tempfile.TemporaryDirectory() as folder:
        yield tiny_pool(Path(folder)) if given.smoke else given.pool


def write(found: dict[str, Any], out: Path | None, unprinted: str = "") -> None:
    """Print what was found, without its field `unprinted`, and write all of it to `out`."""
    print(json.dumps({key: value for key, value in found.items() if key != unprinted}, indent=2))
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
