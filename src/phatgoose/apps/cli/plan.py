"""What `phatgoose train --plan` shows: a table of experts to be trained, and what was assumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text

from ...errors import ConfigError
from ...experts.kinds.registry import kinds
from ...files.atomic import require_writable, write_text
from ..console import say, show
from .options import EngineOptions, flag_of, only_with

if TYPE_CHECKING:
    from ...tasks.suites.registry import TrainingTask
    from ...training.plan import Plan, Schedule
    from ...training.plan_costs import PlannedTask


WIDE = 180  # columns where output goes to a file
TOTALS = ("steps", "sequences", "tokens", "seconds", "disk_bytes")
ORIGINS = {"file": "", "copy": " (copy)", "hub": " (Hub)"}


@dataclass(frozen=True)
class PlanOptions:
    """What is planned instead of trained, and at which speed."""

    plan: Annotated[
        bool,
        "Train nothing and download nothing: print steps, time, memory and disk; "
        "--workers and --gpus-per-worker describe a cluster.",
    ] = False
    tflops: Annotated[
        float | None,
        "With --plan: speed kept up, in 10^12 operations a second (default: 100, assumed "
        "of an A100- or H100-class GPU in bfloat16).",
    ] = None
    tokens_per_second: Annotated[
        float | None, "With --plan: speed as training reports it, instead of --tflops."
    ] = None
    measure: Annotated[
        bool, "With --plan: train a few batches here for the speed and the memory of a worker."
    ] = False
    json: Annotated[Path | None, "With --plan: write it here too."] = None

    def check(self) -> None:
        """Raise ConfigError for an option of --plan without it, and for two answers about speed."""
        given = {name: value for name, value in vars(self).items() if value is not False}
        only_with("--plan", self.plan, given)  # 0 was given, too
        for name in ("tflops", "tokens_per_second") if self.measure else ():
            if getattr(self, name) is not None:
                flag = flag_of(name)
                raise ConfigError(f"{flag} gives a speed, and --measure finds one: choose.")


def plan_experts(
    options: PlanOptions,
    engine: EngineOptions,
    base: str,
    tasks: list[TrainingTask],
    finished: int,
    settings: Mapping[str, Any],
) -> None:
    """Print what training on `tasks` with `settings` takes; `finished` experts are left out.

    It is written to `options.json` too, if given.
    """
    if options.json is not None:
        require_writable(options.json, ConfigError)
    from ...training.plan import plan_training, schedule
    from ...training.plan_costs import measure_speed

    plan = plan_training(
        base,
        tasks,
        **settings,
        tflops=options.tflops,
        tokens_per_second=options.tokens_per_second,
        speed=measure_speed(base, tasks, **settings) if options.measure else None,
    )
    spread = schedule(plan, engine.workers or 1, engine.gpus_per_worker or 0.0)
    show(_table(plan), width=WIDE)
    kept = [f"{finished} experts are finished and not counted."] if finished else []
    for line in (_expert(plan), _spread(spread, _largest_bound(plan)), *kept, *plan.notes):
        show(line, width=WIDE)
    if options.json is not None:
        totals = {name: getattr(plan, name) for name in TOTALS}
        record = {**asdict(plan), "totals": totals, "schedule": asdict(spread)}
        write_text(options.json, json.dumps(record, indent=2) + "\n", ConfigError)
        say(f"plan -> {options.json}")


def _table(plan: Plan) -> Table:
    count = len(plan.tasks)
    table = Table(title=f"{count} experts to train on {plan.base}")
    table.add_column("expert", no_wrap=True)
    table.add_column("data", overflow="fold")
    for column in ("examples", "steps", "sequences", "tokens", "time", "disk"):
        table.add_column(column, justify="right", no_wrap=True)
    for task in plan.tasks:
        table.add_row(*map(Text, _cells(task)))
    table.add_section()
    bound = _largest_bound(plan)
    sums = (
        f"{plan.sequences:,}",
        bound + _amount(plan.tokens),
        bound + _duration(plan.seconds),
        _size(plan.disk_bytes),
    )
    table.add_row("total", f"{count} tasks", "", f"{plan.steps:,}", *sums)
    return table


def _expert(plan: Plan) -> str:
    """What one expert is, in words."""
    return (
        f"An expert: {plan.sites} sites, {plan.expert_parameters:,} {kinds()[plan.peft].label} "
        f"parameters (kept in {plan.dtype}), {plan.gate_parameters:,} gate parameters. Checkpoints "
        f"while it trains: up to {_size(plan.working_bytes)}."
    )


def _spread(spread: Schedule, bound: str) -> str:
    """How long the workers take and what their machines must have, in words."""
    workers = "1 worker" if spread.workers == 1 else f"{spread.workers} workers"
    gpus = f" ({spread.gpus:g} GPUs)" if spread.gpus else ""
    return (
        f"On {workers}{gpus}: {bound}{_duration(spread.seconds)}, training {spread.share:.0%} of "
        f"their time. Each takes {_size(spread.memory_bytes)} of memory; together up to "
        f"{_size(spread.working_bytes)} of disk for checkpoints beside {_size(spread.disk_bytes)} "
        f"for experts."
    )


def _cells(task: PlannedTask) -> tuple[str, ...]:
    examples = "?" if task.examples is None else f"{task.examples:,}"
    listed = task.examples is not None and not task.counted
    bound = _bound(task)
    return (
        task.name,
        task.source + ORIGINS[task.place],
        f"{'~' if listed else ''}{examples}",
        f"{task.steps:,} + {task.gate_steps:,}",
        f"{task.trained + task.measured:,}",
        bound + _amount(task.tokens),
        bound + _duration(task.seconds),
        _size(task.disk_bytes),
    )


def _bound(task: PlannedTask) -> str:
    """What stands before numbers that are upper bounds."""
    return "≤ " if task.lengths == "limits" else ""


def _largest_bound(plan: Plan) -> str:
    return max(map(_bound, plan.tasks), default="")


def _duration(seconds: float) -> str:
    for unit, length, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 100)):
        if seconds < most * length:
            return f"{seconds / length:.{0 if unit == 's' else 1}f} {unit}"
    return f"{seconds / 86400:,.1f} days"


def _amount(number: float) -> str:
    """A large number in thousands, millions or billions."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f}"


def _size(number: int) -> str:
    return f"{_amount(number)}B" if number >= 1000 else f"{number} B"
