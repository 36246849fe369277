"""The plan of a training, worked out beforehand and spread over workers.

A training plan spread over workers: how long it takes, and what the machines need.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from ..base.fingerprint import dtype_name
from ..base.loading import choose_dtype, load_tokenizer
from ..config import Formatting, GateTraining, Lora, Peft, Training
from ..errors import BaseModelError, ConfigError, TaskError
from ..experts.kinds.registry import kind_for
from ..tasks.encoding import Encoder
from ..tasks.suites.registry import TrainingTask
from ..tasks.task import Task
from .plan_costs import (
    EMBEDDING_DIMS,
    MEASURED,
    SAMPLE,
    TFLOPS,
    TOKENS_PER_WORD,
    TRAINED,
    CostModel,
    PlannedTask,
    Shapes,
    Speed,
)


@dataclass(frozen=True)
class Schedule:
    """How `workers` workers train a plan's experts, each free worker taking the next one.

    `seconds` is the time until the last expert is finished, `share` the part of the workers' time
    spent training. `memory_bytes` is one worker's, `gpus` all workers' together. `working_bytes` is
    the size of the unfinished work of all experts in training, `disk_bytes` of the finished ones.
    """

    workers: int
    gpus: float
    seconds: float
    share: float
    memory_bytes: int
    working_bytes: int
    disk_bytes: int


def schedule(plan: Plan, workers: int, gpus_per_worker: float = 0.0) -> Schedule:
    """The schedule of `plan` on so many workers, which take experts in the plan's order.

    Raises ConfigError for fewer than one worker or a negative number of GPUs.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers!r}, but must be at least 1.")
    if not 0 <= gpus_per_worker < math.inf:
        raise ConfigError(f"gpus_per_worker is {gpus_per_worker!r}, but must be 0 or more.")
    needed = min(workers, len(plan.tasks))
    free = [plan.start_seconds] * needed
    for task in plan.tasks:
        heapq.heapreplace(free, free[0] + task.seconds)
    seconds = max(free, default=0.0)
    return Schedule(
        workers=workers,
        gpus=workers * gpus_per_worker,
        seconds=seconds,
        share=plan.seconds / (seconds * workers) if seconds else 0.0,
        memory_bytes=plan.memory_bytes,
        working_bytes=needed * plan.working_bytes,
        disk_bytes=plan.disk_bytes,
    )


# -------------------------------------------------------------------------------------------------
# What a training run will cost: nothing is trained and nothing downloaded.
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What training a pool of experts of the kind `peft` will cost, task by task.

    `sites`, `expert_parameters` and `gate_parameters` are those of one expert. `working_bytes` is
    the size of one expert's unfinished work, `memory_bytes` the memory of the process, and
    `start_seconds` the time until training begins. `notes` state the assumptions.
    """

    base: str
    peft: str
    dtype: str
    sites: int
    expert_parameters: int
    gate_parameters: int
    tasks: tuple[PlannedTask, ...]
    working_bytes: int
    memory_bytes: int
    start_seconds: float
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Optimiser steps of all experts, gates included."""
        return sum(task.steps + task.gate_steps for task in self.tasks)

    @property
    def sequences(self) -> int:
        """Sequences of all experts, those that are only measured included."""
        return sum(task.trained + task.measured for task in self.tasks)

    @property
    def tokens(self) -> int:
        """Tokens of all experts."""
        return sum(task.tokens for task in self.tasks)

    @property
    def seconds(self) -> float:
        """The time of all experts, one after the other."""
        return sum(task.seconds for task in self.tasks)

    @property
    def disk_bytes(self) -> int:
        """The size of all expert directories."""
        return sum(task.disk_bytes for task in self.tasks)


def plan_training(
    base: str,
    tasks: Sequence[TrainingTask],
    *,
    peft: Peft | None = None,
    training: Training | None = None,
    gate_training: GateTraining | None = None,
    formatting: Formatting | None = None,
    dtype: str = "auto",
    tflops: float | None = None,
    tokens_per_second: float | None = None,
    speed: Speed | None = None,
) -> Plan:
    """What training an expert of `base` on each task will cost.

    A task is planned with the micro-batch that its suite names for it, if any
    (`TrainingTask.settings`), and else with that of `training`. Data on this machine are read, one
    dataset at a time; datasets on the Hub are not. The base's weights are never needed. `tflops` is
    the sustained speed, in 10^12 operations a second (None: TFLOPS); `tokens_per_second`, as
    training reports it, or a measured `speed` take precedence.

    Raises ConfigError for a speed that is not positive and finite, BaseModelError when the base's
    config isn't on this machine (the bases of the recipes are built in), TaskError for a task file
    of the user's own that can't be used.
    """
    peft, training = peft or Lora(), training or Training()
    gate_training, formatting = gate_training or GateTraining(), formatting or Formatting()
    for name, given in (("tflops", tflops), ("tokens_per_second", tokens_per_second)):
        if given is not None and not (0 < given < math.inf):
            raise ConfigError(f"{name} is {given!r}, but must be above 0 and finite.")
    shapes = Shapes.of(base, peft)
    kept = kind_for(peft).new_modules.dtype or choose_dtype(dtype)
    costs = CostModel(
        shapes,
        training,
        gate_training,
        formatting,
        _encoder(base, shapes, formatting),
        kept.itemsize,
        TFLOPS if tflops is None else tflops,
        speed or (None if tokens_per_second is None else Speed.of(tokens_per_second)),
    )
    unread: list[str] = []
    planned = tuple(
        costs.plan(task, _read(task, training.seed, unread))
        for task in tqdm(tasks, desc="plan", unit="task", leave=False, disable=None)
    )
    return Plan(
        base=base,
        peft=kind_for(peft).name,
        dtype=dtype_name(kept),
        sites=shapes.sites,
        expert_parameters=shapes.expert,
        gate_parameters=shapes.gates,
        tasks=planned,
        working_bytes=costs.working_bytes,
        memory_bytes=costs.memory_bytes(planned),
        start_seconds=costs.speed.start_seconds if costs.speed else 0.0,
        notes=tuple(_notes(base, costs, planned, unread)),
    )


def _encoder(base: str, shapes: Shapes, formatting: Formatting) -> Encoder | None:
    """The base's encoder, None when its tokenizer isn't on this machine."""
    try:
        tokenizer = load_tokenizer(base, offline=True)
    except BaseModelError:
        return None
    return Encoder(tokenizer, is_encoder_decoder=shapes.is_encoder_decoder, formatting=formatting)


def _read(task: TrainingTask, seed: int, unread: list[str]) -> Task | None:
    """The task, split as for training; None where its data are not on this machine.

    The reason why a copy can't be read is added to `unread`.
    """
    if task.origin == "hub":
        return None
    try:
        return task.load().with_validation(seed)
    except TaskError as error:
        if task.origin == "file":
            raise
        unread.append(str(error))
        return None


def _notes(
    base: str, costs: CostModel, tasks: Sequence[PlannedTask], unread: Sequence[str]
) -> list[str]:
    """The assumptions, in sentences."""
    limits = costs.formatting
    most = f"{limits.max_input_tokens} + {limits.max_target_tokens}"
    meanings = {
        "measured": f"measured on up to {SAMPLE} of its examples",
        "words": (
            f"estimated as {TOKENS_PER_WORD} a word of up to {SAMPLE} examples, since the base's "
            f"tokenizer isn't on this machine"
        ),
        "limits": (
            f"taken as the {most} to which it is cut, an upper bound that is usually far too high, "
            f"since the data aren't on this machine"
        ),
    }
    counts = Counter(task.lengths for task in tasks)
    notes = [
        f"For {count} of {len(tasks)} tasks, the tokens of a sequence are {meanings[basis]}."
        for basis, count in counts.items()
    ]
    if costs.speed is None:
        notes.append(
            f"Time is {TRAINED} operations for each linear parameter and trained token, {MEASURED} "
            f"for validation and statistics, at {costs.tflops:g} TFLOP/s sustained; "
            f"{TFLOPS:g} is assumed of an A100- or H100-class GPU in bfloat16, not measured."
        )
    else:
        notes.append(costs.speed.note())
    if costs.speed is None or costs.speed.memory_bytes is None:
        notes.append(
            "Memory is counted, not measured: base, trained parameters with gradients and moments, "
            "and the activations of a micro-batch of the longest sequences of a sample."
        )
    if costs.shapes.from_table:
        notes.append(f"The config of {base} isn't on this machine; its published shapes are used.")
    if costs.gate_training.embeddings:
        notes.append(f"Embeddings are taken to have {EMBEDDING_DIMS} dimensions.")
    if unread:
        notes.append(f"{len(unread)} copies can't be read, the first because: {unread[0]}")
    return notes
