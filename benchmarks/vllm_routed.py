"""Routing inside vLLM beside vLLM's own LoRA: time per token, and first tokens on a shared prompt.

    PYTHONPATH=src .venv-vllm/bin/python benchmarks/vllm_routed.py POOL [--rounds 5] [--out FILE]

Each engine is a process of its own, started once, and they take turns in every round, so that what
else the machine does meets all of them. Printed are medians over the rounds, of the wall's time and
of the processor's (of the engine's process), and their ratios to one LoRA of vLLM's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from engines import vllm_environment

PROMPT, WRITTEN, SHARED, TOGETHER = 256, 32, 1000, 8
TASKS = ("prefill", "decode", "decode-8", "shared")
ENGINES = ("base", "lora", "routed-5", "routed-36")


def engine(kind: str, pool: Path, base: str) -> None:
    """What an engine's process does: lines with tasks come in, lines with times go out."""
    if kind.startswith("routed"):
        os.environ["PHATGOOSE_MODEL"] = str(pool)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    experts = sorted(p for p in pool.iterdir() if (p / "adapter_config.json").is_file())
    lora = {"enable_lora": True, "max_lora_rank": 16, "max_loras": 1, "max_cpu_loras": 8}
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "seed": 0}
    settings |= {"skip_tokenizer_init": True, "max_num_batched_tokens": 2048}
    llm = LLM(base, **settings, **(lora if kind == "lora" else {}))
    adapters = [LoRARequest(p.name, i + 1, str(p)) for i, p in enumerate(experts)]

    def ask(prompts: list[list[int]], tokens: int, adapter: int | None = None) -> list[float]:
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        own = adapters[adapter or 0] if kind == "lora" else None
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        wall, processor = time.perf_counter(), time.process_time()
        llm.generate(asked, sampling, use_tqdm=False, lora_request=own)
        return [time.perf_counter() - wall, time.process_time() - processor]

    tell({"ready": kind})
    for line in sys.stdin:
        task, seed = json.loads(line)
        ids = [[(7919 * (seed * 64 + row) + 31 * i) % 40000 + 100 for i in range(PROMPT)]
               for row in range(TOGETHER)]  # fmt: skip
        if task == "prefill":  # of prompts that no cache has
            tell(per(ask(ids[:1], 1), PROMPT))
        elif task in ("decode", "decode-8"):
            few = ids[: 1 if task == "decode" else TOGETHER]
            ask(few, 1)  # from now on the prompts are cached
            first, all_of = ask(few, 1), ask(few, 1 + WRITTEN)
            tell(per([b - a for a, b in zip(first, all_of, strict=True)], WRITTEN * len(few)))
        else:  # the same prompt five times: by each expert in turn, or routed
            shared = [(seed * 104729 + 17 * i * i + 3 * i) % 40000 + 100 for i in range(SHARED)]
            tell(
                [
                    statistics.median(times)
                    for times in zip(
                        *(ask([[*shared, 50 + each]], 1, each) for each in range(5)), strict=True
                    )
                ]
            )


def per(times: list[float], tokens: int) -> list[float]:
    return [each / tokens for each in times]


def tell(found: object) -> None:
    print(f"ANSWER {json.dumps(found)}", flush=True)


class Engine:
    def __init__(self, kind: str, pool: Path, base: str) -> None:
        command = [sys.executable, __file__, "--engine", kind, str(pool), "--base", base]
        # Without a second process its processor time is all of it.
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        more = {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": threads}
        environment = vllm_environment(None, **more)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.read()

    def ask(self, task: str, seed: int) -> list[float]:
        self.process.stdin.write(json.dumps([task, seed]) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> list[float]:
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise SystemExit("an engine ended")


def copies(pool: Path, folder: Path, count: int) -> Path:
    """A pool of `count` experts under names of their own, made of those in `pool`."""
    experts = sorted(p for p in pool.iterdir() if (p / "phatgoose.json").is_file())
    for index in range(count):
        into = folder / f"{experts[index % len(experts)].name}-{index}"
        shutil.copytree(experts[index % len(experts)], into)
        info = json.loads((into / "phatgoose.json").read_text())
        info["name"] = into.name
        (into / "phatgoose.json").write_text(json.dumps(info))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--base", default=None, help="folder; else the embedded one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--engine", choices=ENGINES, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.base is None:
        from phatgoose.base import smollm2_folder

        options.base = str(smollm2_folder())
    if options.engine:
        engine(options.engine, options.pool, options.base)
        return
    with tempfile.TemporaryDirectory() as work:
        many = copies(options.pool, Path(work), 36)
        engines = {
            kind: Engine(kind, many if kind == "routed-36" else options.pool, options.base)
            for kind in ENGINES
        }
        found = measure(engines, options.tasks, options.rounds)
    show(found)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(
    engines: dict[str, Engine], tasks: list[str], rounds: int
) -> dict[str, dict[str, list[list[float]]]]:
    found = {task: {kind: [] for kind in engines} for task in tasks}
    for turn in range(rounds + 1):
        for task in tasks:
            for kind, each in engines.items():
                times = each.ask(task, turn)
                if turn:  # the first round warms up
                    found[task][kind].append(times)
    return found


def show(found: dict[str, dict[str, list[list[float]]]]) -> None:
    print("task       engine      wall ms  processor ms  to LoRA: wall  processor")
    for task, engines in found.items():
        middle = {
            kind: [1000 * statistics.median(each) for each in zip(*times, strict=True)]
            for kind, times in engines.items()
        }
        for kind, (wall, processor) in middle.items():
            lora = middle["lora"]
            print(
                f"{task:10} {kind:10} {wall:8.2f} {processor:13.2f} {wall / lora[0]:14.2f} "
                f"{processor / lora[1]:10.2f}"
            )


if __name__ == "__main__":
    main()
