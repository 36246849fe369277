"""Commands of researchers: compare, replay, lm-eval, analyse, routers."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ...config import Routing, settings_of
from ...errors import ConfigError, EvaluationError
from ...files import half_character, require_writable
from ...routing.routers.registry import OURS, check_known, known_names, split_routers
from ..console import report, say, show
from . import options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...experts.pool import Pool


def compare(
    *,
    pool: options.PoolArgument,
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
        typer.Option(
            "--method",
            "--methods",
            help="all, or routers with or without settings (arrow:form=peft); repeatable, or "
            "with commas.",
        ),
    ] = ["all"],  # noqa: B006  typer wants a list
    reference: Annotated[
        list[str] | None,
        "LABEL=MODEL: one more row, from an expert, a pool (routed by phatgoose, since such a row "
        "is about its gates), a routed model or a base (repeatable).",
    ] = None,
    out: Annotated[Path, "Folder of results and tables."] = Path("comparison"),
    tasks: options.SuiteOptions,
    base: options.BaseOptions,
    engine: options.EngineOptions,
    routing: Annotated[Routing, "router"],
) -> None:
    """Score many methods on whole suites, side by side; finished runs in --out are kept."""
    references = dict(map(_reference, reference or ()))
    rows = split_routers(methods)
    for name in {*rows} - {"all", "base"}:
        check_known(name)
    from ...tasks.suites.registry import open_suite

    names = ",".join(name.strip(",") for name in suites).split(",")
    opened_suites = [open_suite(name) for name in names]
    options.require_there(base.base)
    opened = options.open_pool(pool)
    from ...evaluation.compare import compare as run
    from ..tables import drawn

    with engine.open() as chosen:
        comparison = run(
            opened,
            opened_suites,
            rows,
            out=out,
            base=base.load(opened.base),
            references=references,
            routing=routing,
            sources=tasks.sources,
            engine=chosen,
            **vars(tasks.scoring),
        )
    for table in (comparison.means(), comparison.differences()):
        if table.rows:
            show(drawn(table))
    say(f"tables -> {out / 'comparison.md'}, .json; runs -> {out / 'results.jsonl'}")


def _reference(value: str) -> tuple[str, str]:
    label, _, place = value.partition("=")
    if not (label and place) or half_character(label) is not None:
        raise ConfigError(
            f"--reference is {value!r}, but must have the form LABEL=MODEL, in UTF-8."
        )
    return label, place


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness' own command, which then has --model phatgoose."""
    from ...evaluation.lm_eval import main

    main(context.args)


def replay(
    marks: Annotated[Path, typer.Argument(help="A file of marks, or a folder of such files.")],
    *,
    router: Annotated[
        list[str] | None, "A prompt router whose choices the marks hold (repeatable)."
    ] = None,
    rule: Annotated[
        list[str] | None, "package.module:function, from a prompt to an expert (repeatable)."
    ] = None,
    json: options.JsonOption = None,
) -> None:
    """Score a rule that chooses one expert per prompt, from marks and without a model."""
    from ...evaluation import replay as scoring
    from ..tables import replay_table

    rules = {name: scoring.router_rule(name) for name in split_routers(router or [])}
    rules |= {name: scoring.imported_rule(name) for name in rule or []}
    replayed = list[scoring.Replay]()
    for sheet in scoring.read_marks(marks):
        choices = {name: scoring.chosen_by(sheet, rule) for name, rule in rules.items()}
        replayed += scoring.replay(sheet, choices)
    if not report(json, list(map(asdict, replayed)), "numbers"):
        show(*map(replay_table, replayed), width=120)
    if not rules:
        say("Next, score a rule: --rule package.module:function (docs/comparing.md).", err=True)


def analyse(
    *,
    model: options.ModelArgument,
    suite: Annotated[
        list[str],
        typer.Option(
            "--suite", "--task", help="A suite or a task file, as for compare (repeatable)."
        ),
    ],
    out: Annotated[Path, "Folder of the report."] = Path("analysis"),
    against: Annotated[
        list[str] | None, "Another router over the same pool; repeatable, or with commas."
    ] = None,
    opening: options.ModelOptions,
    reading: options.SuiteOptions,
) -> None:
    """Report which experts served the tokens of tasks: one page, numbers, figures."""
    others = split_routers(against or [])
    routing = opening.routing
    for name in others:
        check_known(name)
    options.require_there(model, opening.base)
    from ...tasks.suites.registry import open_suite

    tasks = [task for name in suite for task in open_suite(name).load(reading.sources)]
    from ...analysis.analyse import analyse as run
    from ...analysis.report import REPORT, write_report
    from ...routing.opening import is_pool
    from ..tables import routers_table

    require_writable(out / REPORT, EvaluationError)
    subject: PreTrainedModel | Pool
    if is_pool(model):
        options.warn_of_unused_k(routing)
        subject = opening.open_pool([Path(model)])
        base = opening.load(subject.base)
        routers = [routing.router, *others]
    else:
        # The scores are Oracle's, which the report compares with; they choose no expert here.
        subject = replace(opening, scores=None).open(model).model
        base = None
        routers = others
    analysis = run(
        subject,
        tasks,
        routers=routers,
        routing=routing,
        base=base,
        scores=opening.scores,
        **vars(reading.scoring),
    )
    show(routers_table(analysis))
    for router, analysed in analysis.routers.items():
        for finding in analysed.findings:
            warnings.warn(f"{router}: {finding.message}", stacklevel=2)
    say(f"report -> {write_report(analysis, out)}")


def routers(
    name: Annotated[
        str | None, typer.Argument(help="Describe this router and its settings; default: list all.")
    ] = None,
) -> None:
    """List the routers, or describe one with its settings."""
    if name is None:
        table = Table(title="Routers")
        for column in ("router", "experts that act", "needs", "k"):
            table.add_column(column, no_wrap=column == "router")
        rows = dict(OURS)
        if len(known_names()) > len(OURS):  # those of other packages are imported to be listed
            from ...routing.routers.router import all_routers

            rows = {router: kind.listed() for router, kind in all_routers().items()}
        for router, listed in rows.items():
            table.add_row(router, listed.summary, ", ".join(listed.needs), str(listed.k or ""))
        show(table)
        say("settings of one: phatgoose routers NAME; choose with --router NAME:SETTING=VALUE,…")
    else:
        _describe(name)


def _describe(name: str) -> None:
    check_known(name)
    from ...routing.routers.router import class_of, written

    router = class_of(name)
    say(f"{router.name}: {router.listed().summary}")
    if router.needs:
        say(f"needs: {', '.join(router.needs)}")
    if router.usual_k is not None:
        turn = "input" if router.per_input else "token"
        say(f"k: experts for each {turn} (default: {router.usual_k})")
    for setting in settings_of(router):
        default = "none" if setting.default is None else written(setting.default)
        say(f"{setting.name}: {setting.help} (default: {default})")
