"""What training a pool will cost, for `train --plan`: steps, tokens, and time if it is measured.

Nothing is trained and nothing downloaded, but for `measured`.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import T5Config, TrainerCallback

from ..base import load_base, load_skeleton, load_tokenizer
from ..config import Lora
from ..errors import BaseModelError, TaskError
from ..evaluation.results import Table
from ..experts import kind_for
from ..tasks.encoding import Encoder
from ..tasks.suites.registry import TrainingTask
from ..tasks.task import Example, draw
from ..training.train_expert import placed_sites, train_expert
from ..training.trainer import Hyperparameters
from .console import report, show
from .tables import drawn

SAMPLE = 200  # examples whose tokens are counted
TRIAL_STEPS = 3  # the first is a warm-up and isn't timed
WIDE = 180  # columns where output goes to a file
T5_XL = "google/t5-xl-lm-adapt"  # the paper's base, whose config plans don't have to find
T5_XL_CONFIG = T5Config(
    **{"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)


@dataclass(frozen=True)
class PlannedTask:
    """What training one expert will cost.

    `examples` are the training examples, None if unknown; `is_bound` means that the data or the
    base's tokenizer aren't here, so that sequences count with the length to which they are cut.
    `tokens` include validation and statistics. `seconds` is None if no speed is known.
    """

    name: str
    source: str
    examples: int | None
    steps: int
    gate_steps: int
    tokens: int
    is_bound: bool
    seconds: float | None


class Speed(NamedTuple):
    """Trained tokens a second, without padding, and the peak memory if it is known."""

    tokens_per_second: float
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """What training a pool will cost, task by task.

    `sites`, `expert_parameters` and `gate_parameters` are those of one expert of the kind `label`;
    `memory_bytes` is as in `Speed`.
    """

    base: str
    label: str
    sites: int
    expert_parameters: int
    gate_parameters: int
    tasks: tuple[PlannedTask, ...]
    memory_bytes: int | None


def plan_of(
    base: str, settings: Hyperparameters, tasks: Sequence[TrainingTask], speed: Speed | None = None
) -> Plan:
    """What training an expert of `base` on each task will cost.

    Data on this machine are read, one dataset at a time; datasets on the Hub are not. Raises
    BaseModelError when the base's config isn't on this machine (the paper's is built in),
    ConfigError when no site matches, and TaskError for data that can't be used.
    """
    model = load_skeleton(T5_XL_CONFIG if base == T5_XL else base)
    try:
        tokenizer = load_tokenizer(base, offline=True)
        encoder = Encoder.for_model(model, tokenizer, settings.formatting)
    except BaseModelError:
        encoder = None
    peft = settings.peft or Lora()
    kind, sites = kind_for(peft), placed_sites(model, peft)
    planned = [
        _planned(task, settings, encoder, speed)
        for task in tqdm(tasks, desc="plan", unit="task", leave=False, disable=None)
    ]
    return Plan(
        base=base,
        label=kind.label,
        sites=len(sites),
        expert_parameters=kind.new_modules.count(model, peft, sites),
        gate_parameters=sum(site.in_features for site in sites.values()),
        tasks=tuple(planned),
        memory_bytes=speed and speed.memory_bytes,
    )


def _planned(
    task: TrainingTask, settings: Hyperparameters, encoder: Encoder | None, speed: Speed | None
) -> PlannedTask:
    gates, training, limits = settings.gate_training, settings.training, settings.formatting
    validated, examples = training.eval_examples, task.entry.train_examples
    length: float = limits.max_input_tokens + limits.max_target_tokens
    data = None if task.origin == "hub" else task.load().with_validation(training.seed)
    if data is not None:
        validated, examples = min(validated, len(data.validation)), len(data.train)
    if data is not None and encoder is not None:
        length = fmean(p.length for p in encoder.pairs(draw(data.train, SAMPLE, training.seed)))
    trained = training.batch_size * (training.steps + settings.gate_steps)
    sample = min(gates.statistics_examples, examples or gates.statistics_examples)
    forward = validated * math.ceil(training.steps / training.eval_every)
    forward += sample * (gates.means + gates.readings)
    # A pass forward takes half the time of one that trains.
    passed = (trained + forward / 2) * length
    return PlannedTask(
        name=task.name,
        source=task.entry.source or task.named,
        examples=examples,
        steps=training.steps,
        gate_steps=settings.gate_steps,
        tokens=round((trained + forward) * length),
        is_bound=data is None or encoder is None,
        seconds=speed and passed / speed.tokens_per_second,
    )


class _Times(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended.append(time.perf_counter())


def measured(
    base: str, dtype: str, settings: Hyperparameters, tasks: Sequence[TrainingTask]
) -> Speed:
    """The speed and peak memory of two micro-batches: one drawn, the longest of a sample.

    They are of the task with the longest examples. Raises TaskError when no task has its data on
    this machine, and what training raises.
    """
    trials = []
    for task in tasks:
        if task.origin != "hub":
            data, training = task.load(), settings.training
            rows = min(training.micro_batch_size, training.batch_size)
            sample = draw(data.train, SAMPLE, seed=0)
            longest = tuple(sorted(sample, key=_characters, reverse=True)[:rows])
            trials.append(replace(data, train=(*sample[:rows], *longest), validation=longest))
    if not trials:
        raise TaskError("No task has its data on this machine: no speed can be measured here.")
    trial = max(trials, key=lambda trial: sum(map(_characters, trial.validation)))
    size, times = len(trial.train), _Times()
    training = replace(settings.training, batch_size=size, micro_batch_size=size // 2)
    training = replace(training, steps=TRIAL_STEPS, eval_every=TRIAL_STEPS)
    gates = replace(settings.gate_training, gate_steps=1, embeddings=False)
    short = vars(replace(settings, training=training, gate_training=gates))
    with tempfile.TemporaryDirectory(prefix="phatgoose-") as folder:
        loaded, out = load_base(base, dtype=dtype), Path(folder) / "trial"
        expert = train_expert(loaded, trial, out=out, callbacks=[times], **short)
    tokens = expert.info.metrics["expert_tokens"] * (TRIAL_STEPS - 1) / TRIAL_STEPS
    return Speed(tokens / (times.ended[TRIAL_STEPS - 1] - times.ended[0]), most_memory())


def _characters(example: Example) -> int:
    return len(example.input) + len(example.target)


def most_memory() -> int | None:
    """The peak memory of this process, or of its GPU, in bytes; None if unknown."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    status = Path("/proc/self/status")  # getrusage tells a new process what its parent held
    if not status.is_file():
        return None
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(encoding="ascii"), re.M)
    return 1024 * int(peak[1]) if peak else None


def print_plan(plan: Plan, json: Path | None, finished: int) -> None:
    """Print the plan, or write it as `json`; `finished` experts are left out of it."""
    if report(json, asdict(plan), "plan"):
        return
    is_bound = any(task.is_bound for task in plan.tasks)
    total = PlannedTask(
        name="total",
        source=f"{len(plan.tasks)} tasks",
        examples=None,
        steps=sum(task.steps for task in plan.tasks),
        gate_steps=sum(task.gate_steps for task in plan.tasks),
        tokens=sum(task.tokens for task in plan.tasks),
        is_bound=is_bound,
        seconds=sum(task.seconds or 0.0 for task in plan.tasks) or None,
    )
    rows = []
    for task in (*plan.tasks, total):
        bound = "≤ " if task.is_bound else ""
        examples = "" if task.examples is None else f"{task.examples:,}"
        tokens = f"{bound}{tqdm.format_sizeof(task.tokens)}"  # 1234 as 1.23k
        needed = "" if task.seconds is None else str(timedelta(seconds=round(task.seconds)))
        steps = f"{task.steps:,} + {task.gate_steps:,}"
        rows.append([task.name, task.source, examples, steps, tokens, needed])
    head = ["expert", "data", "examples", "steps", "tokens", "time"]
    title = f"{len(plan.tasks)} experts to train on {plan.base}"
    show(drawn(Table(title, head, rows)), width=WIDE)
    lines = [
        f"An expert: {plan.sites} sites, {plan.expert_parameters:,} {plan.label} parameters, "
        f"{plan.gate_parameters:,} gate parameters."
    ]
    if plan.memory_bytes:
        lines.append(f"A worker: peak memory {tqdm.format_sizeof(plan.memory_bytes)}B.")
    if is_bound:
        lines.append("≤: data or tokenizer aren't here, so sequences count as long as they may be.")
    if finished:
        lines.append(f"{finished} experts are finished and not counted.")
    for line in lines:
        show(line, width=WIDE)
