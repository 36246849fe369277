"""What `phatgoose train --plan` shows: a table of experts to be trained, and what was assumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.table import Table
from rich.text import Text

from ...config import KIND_NAMES
from ...errors import ConfigError
from ..console.printing import say, show

if TYPE_CHECKING:
    from ...training.planning.costs import PlannedTask
    from ...training.planning.plan import Plan
    from ...training.planning.schedule import Schedule

__all__ = [
    "JsonOption",
    "MeasureOption",
    "PlanOption",
    "TflopsOption",
    "TokensPerSecondOption",
    "refuse_without_plan",
    "show_plan",
]

# typer reads annotations at run time, on Python 3.10 too: hence Optional instead of "| None".
PlanOption = Annotated[
    bool,
    typer.Option(
        "--plan",
        help="Train nothing and download nothing: tell steps, time, memory and disk; "
        "--workers and --gpus-per-worker describe a cluster.",
    ),
]
MeasureOption = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="With --plan: train a few batches here for the speed and the memory of a worker.",
    ),
]
TflopsOption = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--tflops",
        help="With --plan: speed kept up, in 10^12 operations a second (default: 100, assumed of "
        "an A100- or H100-class GPU in bfloat16).",
    ),
]
TokensPerSecondOption = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--tokens-per-second",
        help="With --plan: speed as training reports it, instead of --tflops.",
    ),
]
JsonOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--json", help="With --plan: write it here too."),
]

WIDE = 180  # columns where nobody's terminal says otherwise
TOTALS = ("steps", "sequences", "tokens", "seconds", "disk_bytes")
PLACES = {"file": "", "copy": " (copy)", "hub": " (Hub)"}


def refuse_without_plan(options: Mapping[str, object]) -> None:
    """Raise ConfigError for a flag of --plan that was given without it."""
    for name, value in options.items():
        if value is not None and value is not False:  # 0 was given, too
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} is for --plan, which was not given.")


def show_plan(plan: Plan, spread: Schedule, *, finished: int, path: Path | None) -> None:
    """Print `plan`, which leaves out `finished` experts, and how it is `spread` over workers.

    Both are written to `path` as JSON, if any.
    """
    count = len(plan.tasks)
    table = Table(title=f"{count} experts to train on {plan.base}")
    table.add_column("expert", no_wrap=True)
    table.add_column("data", overflow="fold")
    for column in ("examples", "steps", "sequences", "tokens", "time", "disk"):
        table.add_column(column, justify="right", no_wrap=True)
    for task in plan.tasks:
        table.add_row(*map(Text, _cells(task)))
    table.add_section()
    bound = max(map(_bound, plan.tasks), default="")
    sums = (
        f"{plan.sequences:,}",
        bound + _amount(plan.tokens),
        bound + _duration(plan.seconds),
        _size(plan.disk_bytes),
    )
    table.add_row("total", f"{count} tasks", "", f"{plan.steps:,}", *sums)
    show(table, width=WIDE)
    expert = (
        f"An expert: {plan.sites} sites, {plan.expert_parameters:,} {KIND_NAMES[plan.peft]} "
        f"parameters (kept in {plan.dtype}), {plan.gate_parameters:,} gate parameters. Checkpoints "
        f"while it trains: up to {_size(plan.working_bytes)}."
    )
    at_once = _spread(spread, bound)
    kept = [f"{finished} experts are finished and not counted."] if finished else []
    for line in (expert, at_once, *kept, *plan.notes):
        show(line, width=WIDE)
    if path is not None:
        from ...files.atomic import write_text

        write_text(path, json.dumps(_record(plan, spread), indent=2) + "\n", ConfigError)
        say(f"plan -> {path}")


def _record(plan: Plan, spread: Schedule) -> dict[str, object]:
    totals = {name: getattr(plan, name) for name in TOTALS}
    return {**asdict(plan), "totals": totals, "schedule": asdict(spread)}


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
        task.source + PLACES[task.place],
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
