"""Commands of researchers: compare, replay, lm-eval, analyse, routers, explain."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ...config import Formatting, Routing, settings_of
from ...errors import ConfigError, EvaluationError, RoutingError, TaskError
from ...files import half_character, require_writable, shortened
from ...routing.routers.registry import AUTO, all_routers, class_of, listing, split_routers
from ..console import check_report, report, say, say_summary, show
from . import options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...analysis.analyse import Analysis
    from ...base import Base
    from ...experts.pool import Pool
    from ...routing.routers.router import Router
    from ...tasks.task import Task


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
    scoring: options.ScoringOptions,
    source: options.SourceOptions,
    base: options.BaseOptions,
    engine: options.EngineOptions,
    routing: Annotated[Routing, options.Without(("router",))],
    formatting: Formatting,
) -> None:
    """Score many methods on whole suites, side by side; finished runs in --out are kept."""
    references = _references(reference or [])
    from ...evaluation.compare import compare as run
    from ...tasks.suites.registry import open_suite
    from ..tables import drawn

    opened = options.open_pool(pool)
    named = [open_suite(name) for name in options.split(suites)]  # refuses before a base is loaded
    with engine.open() as chosen:
        comparison = run(
            opened,
            named,
            split_routers(methods),
            out=out,
            base=base.load_for(opened),
            references=references,
            routing=routing,
            formatting=formatting,
            sources=source.sources,
            engine=chosen,
            **vars(scoring),
        )
    show(*(drawn(each) for each in (comparison.means(), comparison.differences()) if each.rows))
    say(f"tables -> {out / 'comparison.md'}, .json; runs -> {out / 'results.jsonl'}")


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

    check_report(json, EvaluationError)
    rules = {name: scoring.router_rule(name) for name in split_routers(router or [])}
    rules |= {name: scoring.imported_rule(name) for name in rule or []}
    found, held = [], scoring.read_marks(marks)
    for each in held:
        chosen = {name: scoring.chosen_by(each, rule) for name, rule in rules.items()}
        found += scoring.replay(each, chosen)
    if not report(json, [asdict(each) for each in found], "numbers", EvaluationError):
        show(*map(replay_table, found), width=120)
    if not rules:
        routers = {name[7:] for each in held for name in each.columns if name[:7] == "choice/"}
        say(
            f"Next, score a rule: --router NAME ({', '.join(sorted(routers)) or 'none here'}), "
            f"or --rule package.module:function (docs/comparing.md).",
            err=True,
        )


def _references(values: list[str]) -> dict[str, str]:
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


def analyse(
    *,
    model: options.ModelArgument,
    task: Annotated[list[str] | None, "Task file or hub:DATASET (repeatable)."] = None,
    suite: Annotated[list[str] | None, "A suite, as for compare (repeatable)."] = None,
    out: Annotated[Path, "Folder of the report."] = Path("analysis"),
    against: Annotated[
        list[str] | None, "Another router over the same pool; repeatable, or with commas."
    ] = None,
    leave_one_out: Annotated[bool, "Score the pool without each expert in turn."] = False,
    score: Annotated[bool, "Score the tasks too."] = True,
    examples: Annotated[int, "Texts of each task to show token by token.", {"min": 0}] = 1,
    opening: options.ModelOptions,
    scoring: options.ScoringOptions,
    template: options.TemplateOptions,
    source: options.SourceOptions,
    routing: Routing,
    formatting: Formatting,
    given: frozenset[str],
) -> None:
    """Report which experts served the tokens of tasks: one page, numbers, figures."""
    from ...analysis.analyse import analyse as run
    from ...analysis.report import REPORT, write_report

    tasks = _tasks(task, template, suite, source)
    subject, base = _subject(model, opening, routing, given)
    if base is not None and not against:
        options.warn_of_unused_k(routing)
    require_writable(out / REPORT, EvaluationError)
    others = split_routers(against or [])
    analysis = run(
        subject,
        tasks,
        routers=others if base is None else [routing.router, *others],
        routing=routing,
        base=base,
        scores=opening.scores,
        formatting=formatting,
        score=score,
        without_each=leave_one_out,
        examples=examples,
        **vars(scoring),
    )
    _show_analysis(analysis)
    say(f"report -> {write_report(analysis, out)}")


def _tasks(
    files: list[str] | None,
    template: options.TemplateOptions,
    suites: list[str] | None,
    source: options.SourceOptions,
) -> list[Task]:
    from ...tasks.suites.registry import open_suite

    options.only_with("--task", bool(files), vars(template))
    options.only_with("--suite", bool(suites), vars(source))
    tasks = [template.load(name) for name in files or []]
    tasks += [read for name in suites or [] for read in open_suite(name).load(source.sources)]
    if not tasks:
        raise TaskError("Name what to read with --task or --suite.")
    return tasks


def _show_analysis(analysis: Analysis) -> None:
    from ..tables import routers_table

    show(routers_table(analysis))
    for router, found in analysis.routers.items():
        for finding in found.findings:
            warnings.warn(f"{router}: {finding.message}", stacklevel=3)


def _subject(
    model: str, opening: options.ModelOptions, routing: Routing, given: frozenset[str]
) -> tuple[PreTrainedModel | Pool, Base | None]:
    from ...experts.pool import Pool
    from ...routing.compose import is_pool, is_routed

    if is_routed(model):
        return opening.open(model, routing, given).model, None
    if is_pool(model):
        pool = Pool.open(model).select(opening.keep, opening.leave_out)
        return pool, opening.load_for(pool)
    raise RoutingError(
        f"{model} is neither a pool nor a routed model; a base alone routes nothing."
    )


def routers(
    name: Annotated[
        str | None, typer.Argument(help="Describe this router and its settings; default: list all.")
    ] = None,
    json: options.JsonOption = None,
) -> None:
    """List the routers, or describe one with its settings."""
    if name == AUTO:
        from ...routing.routers.auto import BY_TOKEN, DECODER_ONLY

        orders = {"decoders": DECODER_ONLY, "encoder-decoders": BY_TOKEN}
        if not report(json, orders, "routers", ConfigError):
            for bases, order in orders.items():
                say(f"auto on {bases}: the first that experts allow of {', '.join(order)}")
    elif name is None and json is None:
        show(_routers_table())
        say("settings of one: phatgoose routers NAME; choose with --router NAME:SETTING=VALUE,…")
    else:
        chosen = list(all_routers().values()) if name is None else [class_of(name)]
        described = [_described(router) for router in chosen]
        if not report(json, described, "routers", ConfigError):
            _describe(chosen[0])


def _describe(router: type[Router]) -> None:
    from ...routing.routers.router import written

    say(f"{router.name}: {listing()[router.name].summary}")
    if router.needs:
        say(f"needs: {_named(router.needs)}")
    if router.usual_k is not None:
        turn = "input" if router.per_input else "token"
        say(f"k: experts for each {turn} (default: {router.usual_k})")
    for setting in settings_of(router):
        default = "none" if setting.default is None else written(setting.default)
        say(f"{setting.name}: {setting.help} (default: {default})")


def _described(router: type[Router]) -> dict[str, object]:
    settings = {each.name: each.default for each in settings_of(router)}
    listed = listing()[router.name]
    return {
        **{"name": router.name, "summary": listed.summary, "needs": list(router.needs)},
        **{"k": router.usual_k, "per_input": router.per_input, "settings": settings},
    }


def _routers_table() -> Table:
    table = Table(title="Routers")
    for column in ("router", "experts that act", "needs", "k"):
        table.add_column(column, no_wrap=column == "router")
    for name, listed in listing().items():
        table.add_row(name, listed.summary, _named(listed.needs), str(listed.k or ""))
    return table


def _named(needs: Iterable[str]) -> str:
    return ", ".join("LoRAs" if need == "lora" else need for need in needs)


def explain(
    *,
    model: options.ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to explain.")],
    answer: Annotated[str | None, "Explain this answer instead of the model's own."] = None,
    layer: Annotated[str | None, "Look at one layer: 7, or 'encoder 7'. Default: all."] = None,
    kind: Annotated[str | None, "Look at one kind of site, such as q_proj. Default: all."] = None,
    json: options.JsonOption = None,
    opening: options.ModelOptions,
    max_new_tokens: Annotated[int, "Maximum tokens of the model's own answer.", {"min": 1}] = 16,
    routing: Routing,
    formatting: Formatting,
    given: frozenset[str],
) -> None:
    """Show which experts serve each token of a prompt.

    Each token of prompt and answer has the colour of the expert of greatest weight. The last line
    has each expert's share of the tokens.
    """
    from ..generation import Sampling
    from ..generation import explain as run

    check_report(json, EvaluationError)
    opened = opening.open(model, routing, given)
    explanation = run(
        opened.model,
        opened.tokenizer,
        prompt,
        answer,
        formatting=formatting,
        sampling=Sampling(max_new_tokens),
        layer=layer,
        kind=kind,
    )
    if not report(json, explanation.to_dict(), "weights and trace", EvaluationError):
        show(*explanation.coloured())
        say_summary(explanation.summary)
