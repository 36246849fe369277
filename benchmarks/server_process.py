"""Servers in processes of their own, their memory, and what a benchmark asks them."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

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
        self.seen: list[int] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self) -> int:
        """Resident bytes."""
        (line,) = [x for x in self._status.read_text().splitlines() if x.startswith("VmRSS")]
        return int(line.split()[1]) * 1024

    def _watch(self) -> None:
        while not self._over.wait(SAMPLING):
            self.seen.append(self.now())

    def stop(self) -> list[int]:
        """The highest sample of each tenth of the time, in MiB."""
        self._over.set()
        self._thread.join()
        tenth = max(1, len(self.seen) // 10)
        tenths = [self.seen[i : i + tenth] for i in range(0, len(self.seen), tenth)][:10]
        return [max(part) >> 20 for part in tenths]


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(address, process) of the server that `command --port PORT` starts, once it is well."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    process = subprocess.Popen([*command, "--port", str(port)], env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        while not is_well(address):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}")
            time.sleep(0.2)
        yield address, process
    finally:
        process.terminate()
        process.wait(60)


def is_well(address: str) -> bool:
    """True once the server answers."""
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
