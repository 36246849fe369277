"""Commands of aggregators: pool, compose, generate, evaluate, demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.table import Table

from ...config import KIND_NAMES, Formatting, Routing
from ...errors import RoutingError
from ..console.printing import say, show
from .experts import BaseOption, ChoicesOption, DtypeOption, TemplateOption
from .flags import with_settings
from .recipe import Recipe
from .segments import StoredOption

if TYPE_CHECKING:
    from ...analysis.near_duplicates import Duplicate

__all__ = ["register"]

ScoresOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--scores", help="comparison.json of a compare: for oracle and best-individual."),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A routed model's folder, a pool (folder, hub:OWNER/NAME or manifest), or a base "
        "model alone."
    ),
]
KeepOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--keep", help="Use this expert only (repeatable)."),
]
LeaveOutOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--leave-out", help="Do without this expert (repeatable)."),
]


def register(app: typer.Typer) -> None:
    """Add the aggregators' commands to `app`."""
    app.command("pool", help="List a pool's experts; with --out write a manifest.")(pool)
    app.command("compose", help="Make a routed model of a pool and save it.")(compose)
    app.command("generate", help="Generate text with a routed model.")(generate)
    app.command("evaluate", help="Score a model zero-shot on tasks.")(evaluate)
    app.command("demo", help="Train five small experts, route them, score them.")(demo)


def pool(
    places: Annotated[
        list[Path], typer.Argument(help="Folders of experts, hub:OWNER/NAME, or a manifest.")
    ],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="Write a manifest (.json) here."),
    ] = None,
    duplicates: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--duplicates",
            help="List pairs of experts whose updates have at least this cosine, such as 0.99.",
        ),
    ] = None,
) -> None:
    """List the experts of a pool, and those that are nearly the same."""
    from ...analysis.near_duplicates import near_duplicates
    from ...experts.pool import Pool

    opened = Pool.open(places[0] if len(places) == 1 else places)
    table = Table(title=f"{len(opened)} experts for {opened.base.id}")
    for column in ("expert", "kind", "sites", "sizes", "gates", "means", "embeddings", "folder"):
        table.add_column(column, overflow="fold", no_wrap=column == "kind")
    for expert in opened.experts:
        sizes = sorted({m.size for m in expert.modules.values() if m.size is not None})
        table.add_row(
            expert.name,
            KIND_NAMES[expert.kind],
            str(len(expert.modules)),
            "-".join(str(size) for size in dict.fromkeys((*sizes[:1], *sizes[-1:]))),
            *("yes" if part else "no" for part in (expert.gates, expert.means)),
            "no" if expert.embeddings is None else str(len(expert.embeddings)),
            str(expert.directory),
        )
    show(table)
    if duplicates is not None:
        _show(near_duplicates(opened, duplicates), duplicates)
    if out:
        opened.write_manifest(out)
        say(f"manifest -> {out}")


def _show(pairs: list[Duplicate], threshold: float) -> None:
    table = Table(title=f"{len(pairs)} pairs with a cosine of {threshold:g} or more")
    for column in ("expert", "expert", "cosine", "files"):
        table.add_column(column, overflow="fold")
    for pair in pairs:
        files = "identical" if pair.identical else "differ"
        table.add_row(pair.one, pair.other, f"{pair.cosine:.4f}", files)
    show(table)


@with_settings(Routing)
def compose(
    *,
    pool: Annotated[
        list[Path], typer.Argument(help="Folders of experts, hub:OWNER/NAME, or a manifest.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the routed model.")],
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    keep: KeepOption = None,
    leave_out: LeaveOutOption = None,
    scores: ScoresOption = None,
    stored: StoredOption = None,
    recipe: Recipe,
    routing: Routing,
) -> None:
    """Make a routed model and save it, site by site: the pool may be larger than memory."""
    if out.exists():
        raise RoutingError(f"{out} exists already; choose another --out.")
    from ...base.loading import load_base
    from ...experts.pool import Pool
    from ...routing.open_model import loaded_base
    from ...routing.routers.registry import spec_of
    from ...routing.saved.segments import save_pool

    opened = Pool.open(pool[0] if len(pool) == 1 else pool).select(keep, leave_out)
    name = base or recipe.base
    loaded = load_base(name, dtype=dtype) if name else loaded_base(opened, dtype=dtype)
    packed = save_pool(opened, out, loaded, routing=routing, scores=scores, stored=stored)
    k = f", k = {routing.k}" if spec_of(routing.router).uses_k else ""
    say(
        f"{len(packed.names)} experts at {len(packed.sites)} sites, router {routing.router}{k} "
        f"-> {out}"
    )


@with_settings(Routing, Formatting)
def generate(
    *,
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue or answer.")],
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    keep: KeepOption = None,
    leave_out: LeaveOutOption = None,
    scores: ScoresOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy.")] = False,
    temperature: Annotated[float, typer.Option(min=1e-3, help="Temperature when sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed when sampling.")] = 0,
    show_experts: Annotated[
        bool, typer.Option("--show-experts", help="Colour each token by its top expert.")
    ] = False,
    recipe: Recipe,
    routing: Routing,
    formatting: Formatting,
) -> None:
    """Generate an answer to a prompt."""
    from ...routing.open_model import open_model
    from ..generation import Sampling, answer, coloured

    opened = open_model(
        model,
        base or recipe.base,
        dtype=dtype,
        routing=routing,
        keep=keep,
        leave_out=leave_out,
        scores=scores,
    )
    sampling = Sampling(max_new_tokens, temperature if sample else None, seed)
    result = answer(
        opened.model, opened.tokenizer, prompt, formatting, sampling, record=show_experts
    )
    if result.recording is None:
        show(result.text, wrap=False)
    else:
        show(coloured(result, opened.tokenizer))


@with_settings(Routing, Formatting)
def evaluate(
    *,
    model: ModelArgument,
    task: Annotated[
        list[str], typer.Option("--task", help="Task file or hub:DATASET (repeatable).")
    ],
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    template: TemplateOption = None,
    choices: ChoicesOption = None,
    keep: KeepOption = None,
    leave_out: LeaveOutOption = None,
    scores: ScoresOption = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--limit", min=1, help="Score so many examples a task, drawn by --seed."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="For tasks without choices.")] = 64,
    json: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", help="Write scores and predictions here."),
    ] = None,
    recipe: Recipe,
    routing: Routing,
    formatting: Formatting,
) -> None:
    """Score a model on tasks and print the table."""
    from ...evaluation.evaluate import evaluate as run
    from ...routing.open_model import open_model
    from ...tasks.loading import load_task

    tasks = [load_task(source, template=template, choices=choices) for source in task]
    opened = open_model(
        model,
        base or recipe.base,
        dtype=dtype,
        routing=routing,
        keep=keep,
        leave_out=leave_out,
        scores=scores,
    )
    result = run(
        opened.model,
        tasks,
        tokenizer=opened.tokenizer,
        limit=limit,
        seed=seed,
        formatting=formatting,
        max_new_tokens=max_new_tokens,
    )
    table = Table(title=str(model))
    for column in ("task", "metric", "score", "95 % interval", "n", "ties"):
        table.add_column(column)
    for score in result.scores:
        interval = f"{score.low:.3f} to {score.high:.3f}"
        table.add_row(
            score.task, score.metric, f"{score.score:.3f}", interval, str(score.n), str(score.ties)
        )
    table.add_section()
    table.add_row("mean", "", f"{result.mean:.3f}", "", "", "")
    show(table)
    if json:
        result.write_json(json, predictions=True)
        say(f"scores -> {json}")


def demo(
    base: BaseOption = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the demo's results.")] = Path(
        "demo"
    ),
) -> None:
    """Train five small experts on tasks of our own, route them, score them on unseen tasks."""
    from ..demo.demo import run_demo

    run_demo(base or "smollm2", out)
