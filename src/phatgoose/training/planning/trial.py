"""How fast this machine trains: a few batches of a task, trained for real and thrown away."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ...base.loading import load_base
from ...config import Formatting, GateTraining, Peft, Training
from ...errors import TaskError
from ...tasks.encoding import Encoder
from ...tasks.suites.training_tasks import TrainingTask
from ..loop import Watcher
from ..train_expert import train_expert
from .speed import Speed

__all__ = ["measure_speed"]

STEPS = 6  # of the expert and of the gates each; the first one warms up and isn't counted
MICRO_BATCHES = 2  # in a batch of the trial, at most
VALIDATED = 16  # examples


def measure_speed(
    base: str,
    tasks: Sequence[TrainingTask],
    *,
    peft: Peft | None = None,
    training: Training | None = None,
    gate_training: GateTraining | None = None,
    formatting: Formatting | None = None,
    dtype: str = "auto",
) -> Speed:
    """The speed of one worker of this machine's kind, on the first of `tasks` with data here.

    A small expert is trained with the given settings but for few steps, batches of at most
    MICRO_BATCHES micro-batches and no embeddings. Raises TaskError when no task has its data on
    this machine, and what loading the base and training raise.
    """
    training, gates = training or Training(), gate_training or GateTraining()
    found = next((task for task in tasks if task.origin != "hub"), None)
    if found is None:
        raise TaskError("No task has its data on this machine, so no speed can be measured here.")
    task = found.load().with_validation(training.seed)
    batch = min(training.batch_size, MICRO_BATCHES * training.micro_batch_size)
    task = replace(task, validation=task.validation[:VALIDATED])
    begun = time.perf_counter()
    loaded = load_base(base, dtype=dtype)
    start = time.perf_counter() - begun
    clock = _Clock()
    with tempfile.TemporaryDirectory(prefix="phatgoose-") as folder:
        expert = train_expert(
            loaded,
            task,
            out=Path(folder) / "trial",
            peft=peft,
            training=replace(training, steps=STEPS, batch_size=batch, eval_every=STEPS),
            gate_training=replace(gates, gate_steps=STEPS, means=False, embeddings=False),
            formatting=formatting,
            watcher=clock,
        )
    metrics = expert.info.metrics
    encoder = Encoder.of(loaded, formatting or Formatting())
    validated = sum(
        encoder.pair(row.input, row.target, row.passage).length for row in task.validation
    )
    steps = clock.stages[0]

    def rate(kind: str, times: Sequence[float]) -> float:
        counted = metrics[f"{kind}_tokens"] * (STEPS - 1) / STEPS
        return float(counted / (times[-1] - times[0]))

    expert_rate = rate("expert", steps)
    return Speed(
        expert=expert_rate,
        gates=expert_rate if gates.joint else rate("gate", clock.stages[1]),
        forward=validated / (clock.kept_at - steps[-1]),
        start_seconds=start,
        memory_bytes=_most_memory(),
    )


@dataclass
class _Clock(Watcher):
    """When each step of the expert and of its gates ended, and when the expert was kept."""

    stages: list[list[float]] = field(default_factory=list)
    kept_at: float = 0.0

    def advanced(self, steps: int) -> None:
        """A stage begins with no step, and goes on with single ones."""
        if steps == 0:
            self.stages.append([])
        else:
            self.stages[-1].append(time.perf_counter())

    def kept(self) -> None:
        """The first time is after the expert's validation."""
        self.kept_at = self.kept_at or time.perf_counter()


def _most_memory() -> int:
    """The most bytes that this process has taken: of its GPU, or else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
