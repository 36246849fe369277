"""A small pool and grid on Ray with one and two workers beside this process alone, and a kill test.

    python benchmarks/scale.py --out docs/scale.json       # on a quiet machine
    python benchmarks/scale.py --smoke                      # tiny sizes, where times mean nothing
    python benchmarks/scale.py --smoke --kills-only         # the kill test alone

The same experts are trained and the same cells scored by each engine; results must be equal to
the bit. For the kill test a command trains on two workers and is killed at random moments, in
turns: one of its workers, or the command itself with all it started; given again until it is
through, it must come to the same experts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many as Ray gives a worker of one core

import torch

from phatgoose.apps.ray_engine import RayEngine, connected
from phatgoose.base import load_base
from phatgoose.config import GateTraining, Lora, Training
from phatgoose.evaluation.compare import compare
from phatgoose.experts.expert import LAYOUT
from phatgoose.experts.peft_files import ADAPTER_WEIGHTS
from phatgoose.jobs import Engine, LocalEngine
from phatgoose.tasks.suites.registry import TrainingTask
from phatgoose.training.pool_jobs import ExpertJob, train_experts
from phatgoose.training.trainer import Hyperparameters
from plan_check import write_tasks
from report import circumstances

METHODS = ("base", "merged", "arrow", "phatgoose", "oracle")
TENSORS = (ADAPTER_WEIGHTS, LAYOUT.vectors)
PATIENCE = 600  # seconds for one run of the command


@dataclass(frozen=True)
class Sizes:
    """What is trained and scored."""

    base: str
    experts: int
    steps: int
    gate_steps: int
    batch_size: int
    rows: int
    limit: int

    @property
    def training(self) -> Training:
        """How an expert is trained."""
        return Training(
            steps=self.steps,
            batch_size=self.batch_size,
            micro_batch_size=self.batch_size,
            learning_rate=2e-3,
            eval_every=max(1, self.steps // 4),
            eval_examples=16,
        )

    @property
    def gates(self) -> GateTraining:
        """How its gates are."""
        return GateTraining(gate_steps=self.gate_steps, statistics_examples=32)


@dataclass
class Times:
    """Seconds of one engine, and digests of what came out."""

    engine: str
    training_seconds: float = 0.0
    comparison_seconds: float = 0.0
    experts: dict[str, str] = field(default_factory=dict)
    scores: str = ""


@dataclass
class Kills:
    """What was found after killing a worker, or the command with all its workers."""

    of_workers: int = 0
    of_commands: int = 0
    runs: int = 0
    experts_lost: int = 0  # finished ones that were not there afterwards
    other_experts: int = 0  # that differ from those of an undisturbed run


def digests(folder: Path) -> dict[str, str]:
    """A hash of each finished expert's tensors in `folder`."""
    return {
        place.name: hashlib.sha256(
            b"".join((place / file).read_bytes() for file in TENSORS)
        ).hexdigest()
        for place in sorted(folder.glob("[!.]*"))
        if (place / LAYOUT.info).is_file()
    }


def trained(
    engine: Engine, label: str, sizes: Sizes, tasks: list[TrainingTask], out: Path
) -> Times:
    """The times of one engine, as far as training goes."""
    times, shape = Times(label), Lora(rank=16, alpha=16)
    settings = Hyperparameters(shape, sizes.training, sizes.gates)
    jobs = [ExpertJob(task, settings) for task in tasks]
    begun = time.perf_counter()
    list(train_experts(sizes.base, jobs, out=str(out / "experts"), engine=engine))
    times.training_seconds = time.perf_counter() - begun
    times.experts = digests(out / "experts")
    return times


def timed(engine: Engine, label: str, sizes: Sizes, tasks: list[TrainingTask], out: Path) -> Times:
    """The times of one engine."""
    times = trained(engine, label, sizes, tasks, out)
    suite = out.parent / "suite"
    begun = time.perf_counter()
    comparison = compare(
        out / "experts",
        suite,
        METHODS,
        out=out / "comparison",
        base=load_base(sizes.base),
        limit=sizes.limit,
        engine=engine,
    )
    times.comparison_seconds = time.perf_counter() - begun
    scores = {
        row: {t: r.sample.score for t, r in v.items()} for row, v in comparison.results.items()
    }
    times.scores = hashlib.sha256(json.dumps(scores, sort_keys=True).encode()).hexdigest()
    return times


def command_of(sizes: Sizes, tasks: list[TrainingTask], out: Path) -> list[str]:
    """The command that trains the same experts on two workers."""
    training, gates = sizes.training, sizes.gates
    flags = {
        "base": sizes.base,
        "out": out,
        "engine": "ray",
        "workers": 2,
        "rank": 16,
        "alpha": 16,
        "steps": training.steps,
        "batch-size": training.batch_size,
        "micro-batch-size": training.micro_batch_size,
        "learning-rate": training.learning_rate,
        "eval-every": training.eval_every,
        "eval-examples": training.eval_examples,
        "gate-steps": gates.gate_steps,
        "statistics-examples": gates.statistics_examples,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    sources = [task.named for task in tasks]
    return [sys.executable, "-m", "phatgoose", "train", *sources, *words, "--resume"]


def kill_test(
    sizes: Sizes, tasks: list[TrainingTask], out: Path, kills: int, wanted: dict[str, str]
) -> Kills:
    """The command, killed `kills` times in all, and what it came to."""
    counts, luck = Kills(), random.Random(0)
    command, finished = command_of(sizes, tasks, out), {}
    while counts.runs < 4 * kills + 4:
        counts.runs += 1
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(luck.uniform(2, 12))
            if counts.of_workers + counts.of_commands >= kills or process.poll() is not None:
                continue
            if counts.of_workers <= counts.of_commands:
                victims = workers_below(process.pid)
                if victims:
                    os.kill(luck.choice(victims), signal.SIGKILL)
                    counts.of_workers += 1
            else:
                kill_all(process)
                counts.of_commands += 1
        if process.poll() is None:
            kill_all(process)
        now = digests(out)
        counts.experts_lost += sum(now.get(name) != digest for name, digest in finished.items())
        finished = now
        if process.returncode == 0:
            break
    counts.other_experts = sum(finished.get(name) != digest for name, digest in wanted.items())
    return counts


def processes_below(pid: int) -> dict[int, str]:
    """Process ids and names of all descendants of `pid`."""
    children: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = stat.read_text().rpartition(")")
            number = int(head.split()[0])
            names[number] = (stat.parent / "cmdline").read_bytes().split(b"\0")[0].decode()
            children.setdefault(int(rest.split()[1]), []).append(number)
        except OSError:  # it has just ended
            continue
    found, waiting = {}, [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found[child] = names.get(child, "")
            waiting.append(child)
    return found


def workers_below(pid: int) -> list[int]:
    """Our workers among the descendants of `pid`: Ray names an actor's process after its class."""
    return [child for child, name in processes_below(pid).items() if name.startswith("ray::Worker")]


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """End the command and the cluster that it started, at once."""
    victims = [process.pid, *processes_below(process.pid)]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def all_engines(sizes: Sizes, tasks: list[TrainingTask], place: Path) -> list[Times]:
    """The times of each engine; the last one has several threads, so its sums another order."""
    runs = [timed(LocalEngine(), "local, 1 thread", sizes, tasks, place / "local")]
    for workers in (1, 2):
        with connected():
            label = f"ray, {workers} workers of 1 thread"
            runs.append(timed(RayEngine(workers), label, sizes, tasks, place / f"ray{workers}"))
    torch.set_num_threads(cores := os.cpu_count() or 1)
    label = f"local, {cores} threads"
    return [*runs, timed(LocalEngine(), label, sizes, tasks, place / "threaded")]


def record_of(sizes: Sizes, runs: list[Times], kills: Kills | None) -> dict[str, Any]:
    """What is written down; all but a last one of several threads must be equal."""
    alone, alike = runs[0], runs[: max(1, len(runs) - 1)]
    return {
        "where": circumstances(),
        "sizes": asdict(sizes),
        "runs": [asdict(run) for run in runs],
        "equal": all(r.experts == alone.experts and r.scores == alone.scores for r in alike),
        "kills": None if kills is None else asdict(kills),
    }


def main() -> None:
    """Time the engines, run the kill test, and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="of an expert; half as many of gates")
    parser.add_argument("--limit", type=int, default=40, help="examples of each of three tasks")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--kills-only", action="store_true", help="leave the times out")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    steps = options.steps
    sizes = Sizes(options.base, options.experts, steps, steps // 2, 8, 200, options.limit)
    if options.smoke:
        sizes = Sizes(options.base, options.experts, 8, 4, 4, 40, 4)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tasks = write_tasks(place, sizes.experts, sizes.rows)
        (place / "suite").mkdir()
        write_tasks(place / "suite", 3, sizes.rows)
        torch.set_num_threads(1)
        if options.kills_only:
            runs = [trained(LocalEngine(), "local, 1 thread", sizes, tasks, place / "local")]
        else:
            runs = all_engines(sizes, tasks, place)
        kills = None
        if options.kills:
            kills = kill_test(sizes, tasks, place / "killed", options.kills, runs[0].experts)
        record = record_of(sizes, runs, kills)
    for run in runs:
        print(
            f"{run.engine}: training {run.training_seconds:.1f} s, comparison "
            f"{run.comparison_seconds:.1f} s"
        )
    print(f"equal results: {record['equal']}; kills: {record['kills']}")
    if options.out:
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
