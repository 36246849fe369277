"""What training a pool will cost, for `train --plan`: steps and tokens.

Nothing is trained and nothing downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from tqdm.auto import tqdm
from transformers import T5Config

from ..base.loading import load_skeleton, load_tokenizer
from ..config import Lora
from ..errors import BaseModelError
from ..evaluation.tables import Table
from ..experts import kind_for
from ..tasks.encoding import Encoder
from ..tasks.suites.registry import TrainingTask
from ..tasks.task import draw
from ..training.train_expert import placed_sites
from ..training.trainer import Hyperparameters
from .console import report, show
from .tables import drawn

SAMPLE = 200  # examples whose tokens are counted
WIDE = 180  # columns where output goes to a file
T5_XL = "google/t5-xl-lm-adapt"  # the paper's base, whose config plans don't have to find
T5_XL_CONFIG = T5Config(
    d_model=2048,
    d_ff=5120,
    num_layers=24,
    num_heads=32,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)


@dataclass
class PlannedTask:
    """What training one expert will cost.

    `examples` are the training examples, None if unknown; `is_bound` means that the data or the
    base's tokenizer aren't here, so that sequences count with the length to which they are cut.
    `tokens` include validation and statistics.
    """

    name: str
    source: str
    examples: int | None
    steps: int
    gate_steps: int
    tokens: int
    is_bound: bool


@dataclass(frozen=True)
class Plan:
    """What training a pool will cost, task by task.

    `sites`, `expert_parameters` and `gate_parameters` are those of one expert of the kind `label`.
    """

    base: str
    label: str
    sites: int
    expert_parameters: int
    gate_parameters: int
    tasks: tuple[PlannedTask, ...]


def plan_of(base: str, settings: Hyperparameters, tasks: Sequence[TrainingTask]) -> Plan:
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
    kind = kind_for(peft)
    sites = placed_sites(model, peft)
    planned = [
        _planned(task, settings, encoder)
        for task in tqdm(tasks, desc="plan", unit="task", leave=False, disable=None)
    ]
    return Plan(
        base=base,
        label=kind.label,
        sites=len(sites),
        expert_parameters=kind.new_modules.count(model, peft, sites),
        gate_parameters=sum(site.in_features for site in sites.values()),
        tasks=tuple(planned),
    )


def _planned(task: TrainingTask, settings: Hyperparameters, encoder: Encoder | None) -> PlannedTask:
    gates = settings.gate_training
    training = settings.training
    limits = settings.formatting
    validated = training.eval_examples
    examples = task.entry.train_examples
    length: float = limits.max_input_tokens + limits.max_target_tokens
    data = None if task.origin == "hub" else task.load().with_validation(training.seed)
    if data is not None:
        validated = min(validated, len(data.validation))
        examples = len(data.train)
    if data is not None and encoder is not None:
        length = fmean(p.length for p in encoder.pairs(draw(data.train, SAMPLE, training.seed)))
    trained = training.batch_size * (training.steps + settings.gate_steps)
    sample = min(gates.statistics_examples, examples or gates.statistics_examples)
    forward = validated * math.ceil(training.steps / training.eval_every)
    forward += sample * (gates.means + gates.readings)
    return PlannedTask(
        name=task.name,
        source=task.entry.source or task.named,
        examples=examples,
        steps=training.steps,
        gate_steps=settings.gate_steps,
        tokens=round((trained + forward) * length),
        is_bound=data is None or encoder is None,
    )


def print_plan(plan: Plan, json: Path | None, finished: int) -> None:
    """Print the plan, or write it as `json`; `finished` experts are left out of it."""
    if report(json, asdict(plan), "plan"):
        return

    total = PlannedTask("total", f"{len(plan.tasks)} tasks", None, 0, 0, 0, False)
    for task in plan.tasks:
        total.steps += task.steps
        total.gate_steps += task.gate_steps
        total.tokens += task.tokens
        total.is_bound |= task.is_bound
    head = ["expert", "data", "examples", "steps", "tokens"]
    rows = [_row(task) for task in (*plan.tasks, total)]
    title = f"{len(plan.tasks)} experts to train on {plan.base}"
    lines = [
        f"An expert: {plan.sites} sites, {plan.expert_parameters:,} {plan.label} parameters, "
        f"{plan.gate_parameters:,} gate parameters."
    ]
    if total.is_bound:
        lines.append("≤: data or tokenizer aren't here, so sequences count as long as they may be.")
    if finished:
        lines.append(f"{finished} experts are finished and not counted.")
    show(drawn(Table(title, head, rows)), *lines, width=WIDE)


def _row(task: PlannedTask) -> list[str]:
    examples = "" if task.examples is None else f"{task.examples:,}"
    tokens = tqdm.format_sizeof(task.tokens)  # 1234 as 1.23k
    if task.is_bound:
        tokens = f"≤ {tokens}"
    return [task.name, task.source, examples, f"{task.steps:,} + {task.gate_steps:,}", tokens]
