"""Commands of researchers: compare, lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ...config import Formatting, Routing
from ...errors import ConfigError
from ..console.printing import say, show
from .engines import AddressOption, CpusOption, EngineOption, GpusOption, WorkersOption, open_engine
from .experts import BaseOption, DataOption, DtypeOption, TemplatesOption
from .flags import with_settings
from .recipe import Recipe

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the researchers' commands to `app`."""
    app.command("compare", help="Score many methods on whole suites, side by side.")(compare)
    app.command(
        "lm-eval",
        help="lm-evaluation-harness' own command, with --model phatgoose known to it.",
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "help_option_names": [],
        },
    )(lm_eval)


@with_settings(Routing, Formatting, without=("router", "expert"))
def compare(
    *,
    pool: Annotated[
        list[Path], typer.Argument(help="Folders of experts, hub:OWNER/NAME, or a manifest.")
    ],
    suites: Annotated[
        list[str],
        typer.Option(
            "--suite",
            "--suites",
            help="t0ho, bbh, bbl, t0hi, flan, a folder of task files, or a suite file (.toml); "
            "repeatable, or with commas.",
        ),
    ],
    methods: Annotated[
        list[str],
        typer.Option("--method", "--methods", help="all, or names; repeatable, or with commas."),
    ] = ["all"],  # noqa: B006  typer wants a list
    reference: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--reference",
            help="LABEL=MODEL: one more row, from an expert, a pool, a routed model or a base "
            "(repeatable).",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of results and tables.")] = Path(
        "comparison"
    ),
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--limit", min=1, help="Score so many examples a dataset, drawn by --seed."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="For generated answers, where a dataset says nothing.")
    ] = 64,
    data: DataOption = None,
    templates: TemplatesOption = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    engine: EngineOption = "local",
    address: AddressOption = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = None,
    recipe: Recipe,
    routing: Routing,
    formatting: Formatting,
) -> None:
    """Score methods on suites; finished cells in --out are kept and used again."""
    references = _references(reference or [])
    from ...base.loading import load_base
    from ...evaluation.comparison.compare import compare as run
    from ...experts.pool import Pool
    from ...tasks.suites.entries import Sources
    from ..console.tables import differences_table, means_table

    opened = Pool.open(pool[0] if len(pool) == 1 else pool)
    name = base or recipe.base or opened.base.id
    revision = None if base or recipe.base else opened.base.revision
    with open_engine(engine, address, workers, gpus_per_worker, cpus_per_worker) as chosen:
        comparison = run(
            opened,
            _split(suites),
            _split(methods),
            out=out,
            base=load_base(name, dtype=dtype, revision=revision),
            references=references,
            limit=limit,
            seed=seed,
            routing=routing,
            formatting=formatting,
            max_new_tokens=max_new_tokens,
            sources=Sources(data or recipe.data, templates or recipe.templates),
            engine=chosen,
        )
    for table in (means_table(comparison), differences_table(comparison)):
        if table is not None:
            show(table)
    say(f"tables -> {out / 'comparison.md'}, .csv, .json; cells -> {out / 'results.jsonl'}")


def lm_eval(context: typer.Context) -> None:
    """Run lm_eval with the words that follow."""
    from ..harness import main

    main(context.args)


def _split(values: list[str]) -> list[str]:
    return [part for value in values for part in value.split(",") if part]


def _references(values: list[str]) -> dict[str, str]:
    """Models by label, from LABEL=MODEL."""
    references = {}
    for value in values:
        label, sign, place = value.partition("=")
        if not (label and sign and place):
            raise ConfigError(f"--reference is {value!r}, but must have the form LABEL=MODEL.")
        references[label] = place
    return references
