"""Commands to see the routing: analyse, explain."""

from __future__ import annotations

import json as json_format
import warnings
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ...config import Formatting, Routing
from ...errors import RoutingError, TaskError
from ..console.printing import say, show
from .experts import (
    BaseOption,
    ChoicesOption,
    DataOption,
    DtypeOption,
    TemplateOption,
    TemplatesOption,
)
from .flags import with_settings
from .recipe import Recipe
from .routed import KeepOption, LeaveOutOption, ModelArgument, ScoresOption

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.command("analyse", help="See where the tokens of tasks go: one page, numbers, figures.")(
        analyse
    )
    app.command("explain", help="Show which experts serve each token of a prompt.")(explain)


@with_settings(Routing, Formatting)
def analyse(
    *,
    model: ModelArgument,
    task: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--task", help="Task file or hub:DATASET (repeatable)."),
    ] = None,
    suite: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--suite", help="A suite, as for compare (repeatable)."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")] = Path("analysis"),
    against: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--against", help="Another router over the same pool; repeatable, or with commas."
        ),
    ] = None,
    scores: ScoresOption = None,
    results: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--results", help="results.jsonl of compare: for curves over pool sizes."),
    ] = None,
    without_each: Annotated[
        bool, typer.Option("--leave-one-out", help="Score the pool without each expert in turn.")
    ] = False,
    score: Annotated[bool, typer.Option(help="Score the tasks too.")] = True,
    examples: Annotated[
        int, typer.Option(min=0, help="Texts of each task to show token by token.")
    ] = 1,
    smoothing: Annotated[
        float, typer.Option(help="Share of the uniform distribution in KL divergences.")
    ] = 0.01,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    keep: KeepOption = None,
    leave_out: LeaveOutOption = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--limit", min=1, help="Read so many examples a task, drawn by --seed."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="For tasks without choices.")] = 64,
    template: TemplateOption = None,
    choices: ChoicesOption = None,
    data: DataOption = None,
    templates: TemplatesOption = None,
    recipe: Recipe,
    routing: Routing,
    formatting: Formatting,
) -> None:
    """Read tasks with a routed model and write a report on who served their tokens."""
    from ...analysis.analyse import analyse as run
    from ...analysis.pool_sizes import pool_size_curves
    from ...base.loading import load_base
    from ...experts.pool import Pool
    from ...routing.open_model import is_pool, is_routed, open_model
    from ...tasks.loading import load_task
    from ...tasks.suites.entries import Sources
    from ...tasks.suites.registry import open_suite
    from ..console.tables import routers_table
    from ..report import write_report

    places = Sources(data or recipe.data, templates or recipe.templates)
    tasks = [load_task(source, template=template, choices=choices) for source in task or []]
    tasks += [entry.read(places) for name in suite or [] for entry in open_suite(name).entries]
    if not tasks:
        raise TaskError("Name what to read with --task or --suite.")
    curves = pool_size_curves(results) if results else []
    others = [name for value in against or [] for name in value.split(",") if name]
    name = base or recipe.base
    settings: dict[str, Any] = {
        "scores": scores,
        "limit": limit,
        "seed": seed,
        "formatting": formatting,
        "score": score,
        "without_each": without_each,
        "examples": examples,
        "smoothing": smoothing,
        "max_new_tokens": max_new_tokens,
    }
    if is_routed(model):
        opened = open_model(model, name, dtype=dtype)
        analysis = run(opened.model, tasks, routers=others, tokenizer=opened.tokenizer, **settings)
    elif is_pool(model):
        pool = Pool.open(model).select(keep, leave_out)
        revision = None if name else pool.base.revision
        loaded = load_base(name or pool.base.id, dtype=dtype, revision=revision)
        routers = [routing.router, *others]
        analysis = run(pool, tasks, routers=routers, routing=routing, base=loaded, **settings)
    else:
        raise RoutingError(
            f"{model} is neither a pool nor a routed model; a base alone routes nothing."
        )
    show(routers_table(analysis))
    for router, found in analysis.routers.items():
        for finding in found.findings:
            warnings.warn(f"{router}: {finding.message}", stacklevel=2)
    say(f"report -> {write_report(analysis, out, curves)}")


@with_settings(Routing, Formatting)
def explain(
    *,
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to explain.")],
    answer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--answer", help="Explain this answer instead of the model's own."),
    ] = None,
    layer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--layer", help="Look at one layer: 7, or 'encoder 7'. Default: all."),
    ] = None,
    kind: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--kind", help="Look at one kind of site, such as q_proj. Default: all."),
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="List every token with its experts' weights.")
    ] = False,
    json: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", help="Write weights and the whole trace here."),
    ] = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    keep: KeepOption = None,
    leave_out: LeaveOutOption = None,
    scores: ScoresOption = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the model's own answer at most.")
    ] = 16,
    recipe: Recipe,
    routing: Routing,
    formatting: Formatting,
) -> None:
    """Show a prompt and its answer, each token in the colour of the expert that served it."""
    from ...errors import EvaluationError
    from ...files.atomic import write_text
    from ...routing.open_model import open_model
    from .explanation import explain as run

    opened = open_model(
        model,
        base or recipe.base,
        dtype=dtype,
        routing=routing,
        keep=keep,
        leave_out=leave_out,
        scores=scores,
    )
    explanation = run(
        opened.model,
        opened.tokenizer,
        prompt,
        answer,
        formatting=formatting,
        max_new_tokens=max_new_tokens,
        layer=layer,
        kind=kind,
    )
    show(*explanation.coloured(), *(explanation.table() if table else ()))
    if json:
        content = json_format.dumps(explanation.to_dict(), ensure_ascii=False) + "\n"
        write_text(json, content, EvaluationError)
        say(f"weights and trace -> {json}")
