"""A plan beside what really happens: the experts of a small recipe, planned and then trained.

    python benchmarks/plan_check.py --out docs/plan-check.json

The plan's speed is measured as `phatgoose train --plan --measure` does. Then the same experts are
trained, and time, disk and memory are held against the plan. On a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

from phatgoose.apps.plan import measured, most_memory, plan_of
from phatgoose.config import GateTraining, Lora, Training
from phatgoose.tasks.suites.registry import TrainingTask, open_tasks
from phatgoose.training.pool_jobs import ExpertJob, train_experts
from phatgoose.training.trainer import Hyperparameters
from report import circumstances

WITHIN = 0.25
TOPICS = ("the sea", "a small town", "old machines", "birds in winter")


def write_tasks(folder: Path, experts: int, rows: int) -> list[TrainingTask]:
    """Tasks of invented text: inputs of 20 to 120 words, short targets."""
    files = []
    for number in range(experts):
        topic = TOPICS[number % len(TOPICS)]
        lines = []
        for row in range(rows):
            words = f"Here is a note of {topic} that somebody wrote on day {row}. " * (2 + row % 9)
            record = {
                "input": f"{words}Is it about {topic}?",
                "target": ("yes", "no")[row % 2],
                "choices": ("yes", "no"),
            }
            lines.append(json.dumps(record) + "\n")
        file = folder / f"notes-{number}.jsonl"
        file.write_text("".join(lines), encoding="utf-8")
        files.append(str(file))
    return open_tasks(files)


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def train(
    base: str, files: list[str], settings: Hyperparameters, out: str
) -> tuple[float, int, list[float]]:
    """Seconds of training all experts, most bytes of memory taken, tokens a second of each."""
    jobs = [ExpertJob(task, settings) for task in open_tasks(files)]
    begun = time.perf_counter()
    trained = list(train_experts(base, jobs, out=out))
    seconds = time.perf_counter() - begun
    memory = most_memory()
    assert memory is not None
    return seconds, memory, [expert.metrics["expert_tokens_per_second"] for expert in trained]


def main() -> None:
    """Plan, train, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--gate-steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    training = Training(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=2e-3,
        eval_every=max(1, options.steps // 2),
        eval_examples=20,
    )
    gates = GateTraining(gate_steps=options.gate_steps, statistics_examples=40)
    settings = Hyperparameters(Lora(rank=16, alpha=16), training, gates)
    with tempfile.TemporaryDirectory() as folder:
        tasks = write_tasks(Path(folder), options.experts, options.rows)
        speed = measured(options.base, "auto", settings, tasks)
        plan = plan_of(options.base, "auto", settings, tasks, speed)
        total = plan.total()
        files = [task.named for task in tasks]
        job = (options.base, files, settings, f"{folder}/experts")
        # a process of its own, so that the trial's memory doesn't count
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            seconds, memory, speeds = process.submit(train, *job).result()
        disk = size_of(Path(folder) / "experts")
    rows = {
        "seconds": (total.seconds or 0.0, seconds),
        "disk_bytes": (total.disk_bytes, disk),
        "memory_bytes": (plan.memory_bytes or 0, memory),
    }
    record = {
        "where": circumstances(),
        "recipe": {**vars(options), "out": None},
        "speed": speed._asdict(),
        "tokens_per_second": speeds,
        "rows": {
            name: {"planned": planned, "measured": got, "ratio": planned / got}
            for name, (planned, got) in rows.items()
        },
    }
    for name, row in record["rows"].items():
        within = "within" if abs(row["ratio"] - 1) <= WITHIN else "NOT within"
        print(
            f"{name}: planned {row['planned']:.4g}, measured {row['measured']:.4g}, "
            f"ratio {row['ratio']:.2f} ({within} {WITHIN:.0%})"
        )
    if options.out:
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
