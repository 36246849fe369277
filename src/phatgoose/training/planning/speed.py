"""How fast a worker trains: given, or measured by training on a few batches."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...base.loading import Base, load_base
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
    longest micro-batch that a sample of each task with data here comes to. Each task has its own
    micro-batch where its suite names one. Raises TaskError when no task has its data on this
    machine, and what loading the base and training raise.
    """
    training, gates = training or Training(), gate_training or GateTraining()
    here = [task for task in tasks if task.origin != "hub"]
    if not here:
        raise TaskError("No task has its data on this machine, so no speed can be measured here.")
    first = here[0].load().with_validation(training.seed)
    begun = time.perf_counter()
    loaded = load_base(base, dtype=dtype)
    start = time.perf_counter() - begun
    trials = _Trials(loaded, peft, gates, formatting or Formatting())
    measured = trials.speed(first, here[0].settings(training))
    trials.train_longest(here, training)
    return replace(measured, start_seconds=start, memory_bytes=most_memory())


@dataclass(frozen=True)
class _Trials:
    """Throw-away experts on one base, with the settings of a plan."""

    base: Base
    peft: Peft | None
    gates: GateTraining
    formatting: Formatting

    @property
    def encoder(self) -> Encoder:
        """How their examples become tokens."""
        return Encoder.of(self.base, self.formatting)

    def speed(self, task: Task, training: Training) -> Speed:
        """The speed of a short training on `task`, without start and memory."""
        most = min(VALIDATED, training.eval_examples)
        task = replace(task, validation=draw(task.validation, most, training.seed))
        batch = min(training.batch_size, MICRO_BATCHES * training.micro_batch_size)
        clock = _Clock()
        metrics = self._train(
            task,
            replace(training, steps=STEPS, batch_size=batch, eval_every=STEPS),
            replace(self.gates, gate_steps=STEPS, means=False, readings=False, embeddings=False),
            TrainingCallback(clock.steps, clock.saved),
        )
        validated = sum(pair.length for pair in self.encoder.pairs(task.validation))
        expert = clock.rate(0, metrics["expert_tokens"])
        return Speed(
            expert=expert,
            gates=expert if self.gates.joint else clock.rate(1, metrics["gate_tokens"]),
            forward=validated / (clock.saved_at - clock.stages[0][-1]),
        )

    def train_longest(self, tasks: Sequence[TrainingTask], training: Training) -> None:
        """One step on the longest micro-batch of `tasks`, for the memory that it takes."""
        longest, own = _longest(tasks, self.encoder, training)
        self._train(
            longest,
            replace(own, steps=1, batch_size=_rows(own), eval_every=1),
            replace(self.gates, gate_steps=1, embeddings=False),
        )

    def _train(
        self,
        task: Task,
        training: Training,
        gates: GateTraining,
        callback: TrainingCallback | None = None,
    ) -> Mapping[str, Any]:
        """The metrics of an expert that is thrown away."""
        with tempfile.TemporaryDirectory(prefix="phatgoose-") as folder:
            expert = train_expert(
                self.base,
                task,
                out=Path(folder) / "trial",
                peft=self.peft,
                training=training,
                gate_training=gates,
                formatting=self.formatting,
                callback=callback,
            )
            return expert.info.metrics


def _rows(training: Training) -> int:
    """Sequences of a micro-batch."""
    return min(training.micro_batch_size, training.batch_size)


def _longest(
    tasks: Sequence[TrainingTask], encoder: Encoder, training: Training
) -> tuple[Task, Training]:
    """The task whose longest micro-batch in a sample has most tokens, and its own settings.

    It has no examples but those, and twice as many for validation, which takes as many at a time.
    """
    most, found = -1, None
    for each in tasks:
        own, task = each.settings(training), each.load()
        rows = _rows(own)
        sample = draw(task.train, SAMPLE, own.seed)
        lengths = [pair.length for pair in pairs_of(encoder, sample)]
        order = sorted(range(len(sample)), key=lambda row: -lengths[row])
        if (total := sum(lengths[row] for row in order[:rows])) > most:
            longest = tuple(sample[row] for row in order[: 2 * rows])
            most = total
            found = replace(task, train=longest[:rows], validation=longest), own
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

    def rate(self, stage: int, tokens: int) -> float:
        """Tokens a second of a stage that took so many in all, without its first step."""
        times = self.stages[stage]
        return tokens * (STEPS - 1) / STEPS / (times[-1] - times[0])

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
