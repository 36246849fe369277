"""How fast a worker trains: given, or measured by training on a few batches."""

from __future__ import annotations

import re
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
from ...tasks.task import Task, draw
from ..progress import TrainingCallback
from ..train_expert import train_expert
from .sample import SAMPLE, pairs_of

if sys.platform != "win32":
    import resource

__all__ = ["Speed", "measure_speed", "most_memory"]

STEPS = 6  # of the expert and of the gates each; the first is a warm-up and isn't counted
MICRO_BATCHES = 2  # in a batch of the trial, at most
VALIDATED = 16  # examples
STATUS = Path("/proc/self/status")  # Linux


@dataclass(frozen=True)
class Speed:
    """The speed of a worker: tokens per second, without padding, of each kind of work.

    `expert` and `gates` are trained tokens, `forward` those of validation and statistics. Loading
    the base takes `start_seconds`. `memory_bytes` is the peak; None means that it wasn't measured.
    """

    expert: float
    gates: float
    forward: float
    start_seconds: float = 0.0
    memory_bytes: int | None = None

    @classmethod
    def of(cls, tokens_per_second: float) -> Speed:
        """The speed of a worker that trains `tokens_per_second`."""
        forward = 2 * tokens_per_second  # the way back costs as much again
        return cls(tokens_per_second, tokens_per_second, forward)

    def note(self) -> str:
        """How the speed is known, in a sentence."""
        if self.memory_bytes is None:
            return f"Time is at {self.expert:g} trained tokens a second, as given."
        return (
            f"Time is at {self.expert:.0f} tokens a second of an expert, {self.gates:.0f} of gates "
            f"and {self.forward:.0f} of validation and statistics, measured here on a few batches."
        )


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
    """The speed of one worker like this machine, on the first of `tasks` with data here.

    A throw-away expert is trained with the given settings, but STEPS steps, batches of at most
    MICRO_BATCHES micro-batches and no statistics; then, for the memory, another for one step on the
    longest micro-batch that a sample of each task with data here comes to. Raises TaskError when no
    task has its data on this machine, and what loading the base and training raise.
    """
    training, gates = training or Training(), gate_training or GateTraining()
    here = [task for task in tasks if task.origin != "hub"]
    if not here:
        raise TaskError("No task has its data on this machine, so no speed can be measured here.")
    task = here[0].load().with_validation(training.seed)
    batch = min(training.batch_size, MICRO_BATCHES * training.micro_batch_size)
    task = replace(task, validation=task.validation[: min(VALIDATED, training.eval_examples)])
    begun = time.perf_counter()
    loaded = load_base(base, dtype=dtype)
    start = time.perf_counter() - begun
    encoder = Encoder.of(loaded, formatting or Formatting())
    clock = _Clock()
    with tempfile.TemporaryDirectory(prefix="phatgoose-") as folder:
        expert = train_expert(
            loaded,
            task,
            out=Path(folder) / "trial",
            peft=peft,
            training=replace(training, steps=STEPS, batch_size=batch, eval_every=STEPS),
            gate_training=replace(
                gates, gate_steps=STEPS, means=False, readings=False, embeddings=False
            ),
            formatting=formatting,
            callback=TrainingCallback(clock.steps, clock.saved),
        )
        rows = min(training.micro_batch_size, training.batch_size)
        train_expert(
            loaded,
            _longest(here, encoder, rows, training.seed),
            out=Path(folder) / "longest",
            peft=peft,
            training=replace(training, steps=1, batch_size=rows, eval_every=1),
            gate_training=replace(gates, gate_steps=1, embeddings=False),
            formatting=formatting,
        )
    metrics = expert.info.metrics
    validated = sum(pair.length for pair in encoder.pairs(task.validation))
    steps = clock.stages[0]

    def rate(kind: str, times: Sequence[float]) -> float:
        counted = metrics[f"{kind}_tokens"] * (STEPS - 1) / STEPS
        return float(counted / (times[-1] - times[0]))

    expert_rate = rate("expert", steps)
    return Speed(
        expert=expert_rate,
        gates=expert_rate if gates.joint else rate("gate", clock.stages[1]),
        forward=validated / (clock.saved_at - steps[-1]),
        start_seconds=start,
        memory_bytes=most_memory(),
    )


def _longest(tasks: Sequence[TrainingTask], encoder: Encoder, rows: int, seed: int) -> Task:
    """The task whose `rows` longest examples in a sample have most tokens, with no more than these.

    Twice as many are for validation, which takes as many at a time.
    """
    most, found = -1, None
    for each in tasks:
        task = each.load()
        sample = draw(task.train, SAMPLE, seed)
        lengths = [pair.length for pair in pairs_of(encoder, sample)]
        order = sorted(range(len(sample)), key=lambda row: -lengths[row])
        if (total := sum(lengths[row] for row in order[:rows])) > most:
            longest = tuple(sample[row] for row in order[: 2 * rows])
            most, found = total, replace(task, train=longest[:rows], validation=longest)
    if found is None:
        raise TaskError("No task has an example.")
    return found


@dataclass
class _Clock:
    """When each step of the expert and of its gates ended, and when the expert was saved."""

    stages: list[list[float]] = field(default_factory=list)
    saved_at: float = 0.0

    def steps(self, count: int) -> None:
        if count == 0:  # a stage begins
            self.stages.append([])
        else:
            self.stages[-1].append(time.perf_counter())

    def saved(self) -> None:
        self.saved_at = self.saved_at or time.perf_counter()  # first after the expert's validation


def most_memory() -> int | None:
    """The peak memory of this process in bytes: of its GPU if there is one, else of the machine.

    None on Windows, where Python isn't told. (On Linux getrusage tells a new process what its
    parent held when it was started, if that is more.)
    """
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    if STATUS.is_file():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(encoding="ascii"), re.M)
        if found is not None:
            return 1024 * int(found[1])
    if sys.platform == "win32":
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
