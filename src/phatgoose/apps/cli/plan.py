"""What `train --plan` shows: a table of experts to be trained, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from ...errors import ConfigError
from ...experts.registry import kind_for
from ..console import report, show
from .options import only_with

if TYPE_CHECKING:
    from ...tasks.suites.registry import TrainingTask

WIDE = 180  # columns where output goes to a file
format_sizeof = tqdm.format_sizeof  # 1234 as 1.23k


@dataclass(frozen=True)
class PlanOptions:
    plan: Annotated[
        bool,
        "Train nothing and download nothing: print steps, tokens, disk and memory, and at a known "
        "speed one worker's time.",
    ] = False
    tokens_per_second: Annotated[
        float | None, "With --plan: a worker's speed as training reports it.", {"min": 1e-3}
    ] = None
    measure: Annotated[
        bool, "With --plan: train a few steps here to find a worker's speed and memory."
    ] = False

    def check(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not False}
        only_with("--plan", self.plan, given)
        if self.measure and self.tokens_per_second is not None:
            raise ConfigError("--tokens-per-second gives a speed, and --measure finds one: choose.")


def plan_experts(
    options: PlanOptions,
    json: Path | None,
    base: str,
    tasks: list[TrainingTask],
    finished: int,
    settings: Mapping[str, Any],
) -> None:
    """Print what training on `tasks` with `settings` takes; `finished` experts are left out."""
    from ...training.plan import Planner, Speed

    planner, given = Planner(base, **settings), options.tokens_per_second
    speed = Speed(given) if given is not None else None
    plan = planner.plan(tasks, planner.measure(tasks) if options.measure else speed)
    rows = [*plan.tasks, plan.total()]
    record = {"base": base, **asdict(plan), "total": asdict(rows[-1])}
    if report(json, record, "plan", ConfigError):
        return
    table = Table(title=f"{len(tasks)} experts to train on {base}")
    table.add_column("expert", no_wrap=True)
    table.add_column("data", overflow="fold")
    for column in ("examples", "steps", "tokens", "disk", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        bound = "≤ " if row.is_bound else ""
        examples = "" if row.examples is None else f"{row.examples:,}"
        tokens, disk = f"{bound}{format_sizeof(row.tokens)}", f"{format_sizeof(row.disk_bytes)}B"
        time = "" if row.seconds is None else f"{bound}{timedelta(seconds=round(row.seconds))}"
        steps = f"{row.steps:,} + {row.gate_steps:,}"
        table.add_row(*map(Text, (row.name, row.source, examples, steps, tokens, disk, time)))
    show(table, width=WIDE)
    label = kind_for(settings["peft"]).label
    lines = [
        f"An expert: {plan.sites} sites, {plan.expert_parameters:,} {label} parameters (kept in "
        f"{plan.dtype}), {plan.gate_parameters:,} gate parameters.",
        f"A worker: peak memory {format_sizeof(plan.memory_bytes)}B, and "
        f"{format_sizeof(plan.working_bytes)}B of disk for checkpoints.",
    ]
    if rows[-1].is_bound:
        lines.append("≤: data or tokenizer aren't here, so sequences count as long as they may be.")
    if finished:
        lines.append(f"{finished} experts are finished and not counted.")
    for line in lines:
        show(line, width=WIDE)
