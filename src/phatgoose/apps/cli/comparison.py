"""Commands of researchers: compare, lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...config import Formatting, Routing
from ...errors import ConfigError
from ...files.encodable import half_character
from ...files.quoting import shortened
from ..console.printing import say, show
from .flags import Without
from .options import (
    BaseOptions,
    EngineOptions,
    PoolArgument,
    ScoringOptions,
    SourceOptions,
    open_pool,
    split,
)

__all__ = ["compare", "lm_eval"]


def compare(
    *,
    pool: PoolArgument,
    suites: Annotated[
        list[str],
        typer.Option(
            "--suite",
            "--suites",
            help="t0ho, bbh, bbl, t0hi, flan, a task file, a folder of them, or a suite file "
            "(.toml); repeatable, or with commas.",
        ),
    ],
    methods: Annotated[
        list[str],
        typer.Option("--method", "--methods", help="all, or names; repeatable, or with commas."),
    ] = ["all"],  # noqa: B006  typer wants a list
    reference: Annotated[
        list[str] | None,
        "LABEL=MODEL: one more row, from an expert, a pool, a routed model or a base (repeatable).",
    ] = None,
    out: Annotated[Path, "Folder of results and tables."] = Path("comparison"),
    scoring: ScoringOptions,
    source: SourceOptions,
    base: BaseOptions,
    engine: EngineOptions,
    routing: Annotated[Routing, Without(("router", "expert"))],
    formatting: Formatting,
) -> None:
    """Score many methods on whole suites, side by side; finished cells in --out are kept."""
    references = _references(reference or [])
    from ...evaluation.comparison.compare import compare as run
    from ..console.tables import differences_table, means_table

    opened = open_pool(pool)
    with engine.open() as chosen:
        comparison = run(
            opened,
            split(suites),
            split(methods),
            out=out,
            base=base.load_for(opened),
            references=references,
            routing=routing,
            formatting=formatting,
            sources=source.sources,
            engine=chosen,
            **vars(scoring),
        )
    for table in (means_table(comparison), differences_table(comparison)):
        if table is not None:
            show(table)
    say(f"tables -> {out / 'comparison.md'}, .csv, .json; cells -> {out / 'results.jsonl'}")


def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness' own command, with --model phatgoose known to it."""
    from ..harness import main

    main(context.args)


def _references(values: list[str]) -> dict[str, str]:
    """Models by label, from LABEL=MODEL."""
    references = {}
    for value in values:
        label, sign, place = value.partition("=")
        if not (label and sign and place):
            raise ConfigError(f"--reference is {value!r}, but must have the form LABEL=MODEL.")
        if half_character(label) is not None:
            raise ConfigError(f"The label of --reference {shortened(value)} is not UTF-8.")
        if label in references:
            raise ConfigError(f"Two references are called {label!r}; rename one.")
        references[label] = place
    return references
