"""What --plan shows: of `train` a table of experts to be trained, of `compose` a model's costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from ...config import FOUR_BITS, Routing
from ...errors import ConfigError, RoutingError
from ...experts.kinds.registry import kinds
from ..console import report, show
from .options import EngineOptions, ModelOptions, flag_of, only_with

if TYPE_CHECKING:
    from ...base.sites import Site
    from ...experts.pool import Pool
    from ...routing.routers.router import Router
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

    def check(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not False}
        only_with("--plan", self.plan, given)  # 0 was given, too
        for name in ("tflops", "tokens_per_second") if self.measure else ():
            if getattr(self, name) is not None:
                flag = flag_of(name)
                raise ConfigError(f"{flag} gives a speed, and --measure finds one: choose.")


def plan_experts(
    options: PlanOptions,
    json: Path | None,
    engine: EngineOptions,
    base: str,
    tasks: list[TrainingTask],
    finished: int,
    settings: Mapping[str, Any],
) -> None:
    """Print what training on `tasks` with `settings` takes; `finished` experts are left out."""
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
    if report(json, record, "plan", ConfigError):
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
        f"On {workers}{f' ({gpus:g} GPUs)' if gpus else ''}: {time}. Peak memory of each: "
        f"{format_sizeof(plan.memory_bytes)}B; disk: {checkpoints}B for checkpoints, "
        f"{format_sizeof(totals['disk_bytes'])}B for experts."
    )


def _duration(seconds: float) -> str:
    for unit, length, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 100)):
        if seconds < most * length:
            return f"{seconds / length:.{0 if unit == 's' else 1}f} {unit}"
    return f"{seconds / 86400:,.1f} days"


# A routed model's costs, by the sizes of its tensors.


def plan_pool(pool: Pool, opening: ModelOptions, routing: Routing, json: Path | None) -> None:
    """Print what the routed model of `pool` takes, and what takes less; no base is loaded."""
    from ...base.loading import choose_dtype, load_skeleton, load_tokenizer, settled_dtype
    from ...base.sites import find_sites
    from ...routing.compose import check_pool_fits
    from ...routing.routers.automatic import settled
    from ...routing.routers.prompt_router import ByPrompt
    from ...routing.routers.router import check_routing, read_scores, router_of
    from ...training.plan import base_bytes

    base, revision = opening.base or pool.base.id, None if opening.base else pool.base.revision
    model = load_skeleton(base, revision=revision)
    tokenizer = load_tokenizer(base, revision=revision, offline=True)
    router = router_of(settled(routing, pool, model, tokenizer))
    check_routing(router, pool)
    scores = read_scores(opening.scores) if opening.scores else None
    pool, sites = router.narrow(pool, scores), find_sites(model)
    check_pool_fits(pool, sites)
    costs = [_costs_at(pool, sites[name], router) for name in pool.sites]
    pool.release()
    values, fixed, changed, choosing = (sum(column) for column in zip(*costs, strict=True))
    tables = router.tables(pool, scores).tensors if isinstance(router, ByPrompt) else {}
    fixed += sum(tensor.nbytes for tensor in tables.values())
    whole = sum(site.in_features * site.out_features for site in sites.values())
    now, k = settled_dtype(opening.dtype), min(router.k, len(pool))
    memory = {}
    for name in dict.fromkeys((now, "bfloat16", FOUR_BITS)):
        size = choose_dtype(name).itemsize
        held = base_bytes(model, size, packed=name == FOUR_BITS)
        memory[name] = {"base": held, "pool": round(values * size + fixed)}
    record = {
        **{"base": base, "experts": list(pool.names), "sites": len(pool.sites), "dtype": now},
        **{"router": router.routing.router, "k": k or None, "memory_bytes": memory},
        "added_computation": (changed + choosing) / whole,
        "reads_prompts": "readings" in router.used(pool),
    }
    if report(json, record, "plan", RoutingError):
        return
    for line in _told(record, (changed / max(k, 1) + choosing) / whole):
        show(line, width=WIDE)


def _costs_at(pool: Pool, site: Site, router: Router) -> tuple[float, float, float, float]:
    """At one site: numbers in the model's dtype, bytes of others, and multiplications for a token.

    The latter are those of the chosen experts, and of choosing them.
    """
    import torch

    from ...routing.stacks import declared, stack_of

    stack = stack_of(pool, site.name, torch.float32, torch.device("cpu"))
    held, count = declared().tensors, len(stack.experts)
    own = {name: tensor for name, tensor in stack.tensors().items() if held[name].in_models_type}
    values = sum(tensor.numel() for tensor in own.values())
    fixed = sum(tensor.nbytes for name, tensor in stack.tensors().items() if name not in own)
    n, d = site.in_features, site.out_features
    if router.folds and stack.plain_lora and values > n * d:  # one weight takes their place
        return n * d, fixed, 0, 0
    rank = max((tensor.shape[1] for tensor in own.values() if tensor.dim() == 3), default=1)
    sizes = {"E": count, "n": n, "d": d, "q": rank}
    choosing = sum(prod(sizes.get(each, 1) for each in form) for form in router.form.values())
    matrices = sum(tensor.numel() for tensor in own.values() if tensor.dim() == 3)
    used = count if router.folds else min(router.k or 1, count)
    return values + choosing, fixed, matrices * used / count, choosing


def _told(record: Mapping[str, Any], added_by_one: float) -> Iterator[str]:
    names, now, k = record["experts"], record["dtype"], record["k"]
    router = f"router {record['router']}{f', k = {k}' if k else ''}"
    yield f"{len(names)} experts at {record['sites']} sites of {record['base']}, {router}, {now}"
    memory = {name: sum(parts.values()) for name, parts in record["memory_bytes"].items()}
    parts = record["memory_bytes"][now]
    each = parts["pool"] / len(names)
    yield (
        f"Memory: {format_sizeof(memory[now])}B, the base {format_sizeof(parts['base'])}B and the "
        f"pool {format_sizeof(parts['pool'])}B ({format_sizeof(each)}B an expert)."
    )
    also = ", and a prompt one more pass of the base" if record["reads_prompts"] else ""
    yield (
        f"Computation: a token takes {record['added_computation']:.1%} more multiplications in the "
        f"base's layers{also}."
    )
    less = [
        f"--dtype {name} ({format_sizeof(size)}B)"
        for name, size in memory.items()
        if size < memory[now]
    ]
    less += [f"--k 1 (then {added_by_one:.1%} more computation)"] if (k or 1) > 1 else []
    less += [f"--leave-out NAME ({format_sizeof(each)}B less)"] if len(names) > 1 else []
    yield f"Less: {', '.join([*less, 'phatgoose export (one adapter, or with --merged none)'])}."
