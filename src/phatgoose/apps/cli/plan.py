"""What `phatgoose train --plan` shows: a table of experts to be trained, and what was assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from ...errors import ConfigError
from ...experts.kinds.registry import kinds
from ..console import check_report, report, show
from .options import EngineOptions, flag_of, only_with

if TYPE_CHECKING:
    from ...tasks.suites.registry import TrainingTask
    from ...training.plan import Plan

WIDE = 180  # columns where output goes to a file
format_sizeof = tqdm.format_sizeof  # 1234 as 1.23k


@dataclass(frozen=True)
class PlanOptions:
    plan: Annotated[
        bool,
        "Train nothing and download nothing: print steps, time, memory and disk; "
        "--workers and --gpus-per-worker describe a cluster.",
    ] = False
    tflops: Annotated[
        float | None,
        "With --plan: sustained TFLOP/s (default: 100, assumed of an A100- or H100-class GPU in "
        "bfloat16).",
    ] = None
    tokens_per_second: Annotated[
        float | None, "With --plan: speed as training reports it, instead of --tflops."
    ] = None
    measure: Annotated[
        bool, "With --plan: train a few steps here to find a worker's speed and memory."
    ] = False
    json: Annotated[Path | None, "With --plan: write it as JSON to this file; -: print it."] = None

    def check(self) -> None:
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
    """Print what training on `tasks` with `settings` takes; `finished` experts are left out."""
    check_report(options.json, ConfigError)
    from ...training.plan import Planner, Speed

    given = options.tokens_per_second
    planner = Planner(
        base,
        **settings,
        tflops=options.tflops,
        speed=None if given is None else Speed(given),
    )
    if options.measure:
        planner.speed = planner.measure(tasks)
    plan = planner.plan(tasks)
    totals, workers = plan.totals(), engine.workers or 1
    spread = {"workers": workers, "seconds": plan.seconds_on(workers)}
    record = {**asdict(plan), "totals": totals, "schedule": spread}
    if report(options.json, record, "plan", ConfigError):
        return
    show(_table(plan, totals), width=WIDE)
    kept = [f"{finished} experts are finished and not counted."] if finished else []
    for line in (*_sums(plan, totals, engine), *kept, *plan.notes):
        show(line, width=WIDE)


def _table(plan: Plan, totals: Mapping[str, float]) -> Table:
    table = Table(title=f"{len(plan.tasks)} experts to train on {plan.base}")
    table.add_column("expert", no_wrap=True)
    table.add_column("data", overflow="fold")
    for column in ("examples", "steps", "tokens", "time", "disk"):
        table.add_column(column, justify="right", no_wrap=True)
    for task in plan.tasks:
        examples = "?" if task.examples is None else f"{task.examples:,}"
        steps = f"{task.steps:,} + {task.gate_steps:,}"
        costs = _costs(vars(task), is_bound=task.is_bound)
        table.add_row(*map(Text, (task.name, task.source, examples, steps, *costs)))
    table.add_section()
    costs = _costs(totals, is_bound=_is_bound(plan))
    table.add_row("total", f"{len(plan.tasks)} tasks", "", f"{totals['steps']:,}", *costs)
    return table


def _costs(numbers: Mapping[str, float], *, is_bound: bool) -> tuple[str, str, str]:
    bound = "≤ " if is_bound else ""
    tokens, disk = format_sizeof(numbers["tokens"]), format_sizeof(numbers["disk_bytes"])
    return bound + tokens, bound + _duration(numbers["seconds"]), f"{disk}B"


def _is_bound(plan: Plan) -> bool:
    return any(task.is_bound for task in plan.tasks)


def _sums(plan: Plan, totals: Mapping[str, float], engine: EngineOptions) -> tuple[str, str]:
    expert = (
        f"An expert: {plan.sites} sites, {plan.expert_parameters:,} {kinds()[plan.peft].label} "
        f"parameters (kept in {plan.dtype}), {plan.gate_parameters:,} gate parameters."
    )
    count = engine.workers or 1
    gpus = count * (engine.gpus_per_worker or 0.0)
    workers = "1 worker" if count == 1 else f"{count} workers"
    time = f"{'≤ ' if _is_bound(plan) else ''}{_duration(plan.seconds_on(count))}"
    checkpoints = format_sizeof(min(count, len(plan.tasks)) * plan.working_bytes)
    return expert, (
        f"On {workers}{f' ({gpus:g} GPUs)' if gpus else ''}: {time}. Each takes "
        f"{format_sizeof(plan.memory_bytes)}B of memory; disk: {checkpoints}B for checkpoints, "
        f"{format_sizeof(totals['disk_bytes'])}B for experts."
    )


def _duration(seconds: float) -> str:
    for unit, length, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 100)):
        if seconds < most * length:
            return f"{seconds / length:.{0 if unit == 's' else 1}f} {unit}"
    return f"{seconds / 86400:,.1f} days"
