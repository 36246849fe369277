"""Real engines for tests: llama-server by xllamacpp, in a process that can be killed."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2

SERVER = Path(__file__).with_name("llama_server.py")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class LlamaServer:
    """llama-server with adapters that are not applied, unless a request says so."""

    def __init__(
        self, base: Path, adapters: list[Path], *, slots: int = 4, context: int = 4096
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._files = [str(base), str(self.port), str(slots), str(context), "1"]
        self._files += map(str, adapters)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, str(SERVER), *self._files]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, **quiet)
        limit = time.monotonic() + 400
        while not self._is_well():
            assert self._process.poll() is None, "llama-server ended at its start"
            assert time.monotonic() < limit, "llama-server doesn't come up"
            time.sleep(0.2)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process = None

    def _is_well(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health", trust_env=False).status_code == 200
        except httpx2.HTTPError:
            return False
