"""Commands of aggregators, from pool and compose to generate and evaluate; the demo."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from ...config import AT_LEAST_1, PromptFormatting, Routing, ScoringSettings
from ...errors import ConfigError, RoutingError, TaskError
from ...files import one_line, reading, require_free, write_text
from ...names import ROUTED_INFO, SMOLLM2, require_folder
from ...routing.routers.registry import check_known
from ...tasks.task import check_text, refuse_twice
from ..console import report, say, show
from . import options


def pool(
    *,
    places: options.PoolArgument,
    prompts: Annotated[
        bool, "Check the example prompts: whose each becomes when it is left out of its expert's."
    ] = False,
    check: Annotated[bool, "With --prompts: the exit code is 1 with warnings, for CI."] = False,
    reader: options.ReaderOption = None,
    markdown: Annotated[Path | None, "With --prompts: write the table as Markdown."] = None,
    json: options.JsonOption = None,
) -> int:
    """List a pool's experts, or check their example prompts."""
    only: dict[str, object] = {"check": check or None, "reader": reader, "markdown": markdown}
    options.only_with("with --prompts", prompts, only)
    opened = options.open_pool(places)
    from ..tables import drawn, pool_table

    if prompts:
        from ...analysis.confusions import confusions

        checked = confusions(opened, reader)
        if markdown:
            write_text(markdown, checked.table.markdown(), ConfigError)
        if not report(json, checked.to_dict(), "prompts and warnings"):
            show(drawn(checked.table), width=140)
            for line in checked.table.notes:
                say(line)
        return int(check and bool(checked.findings))

    if not report(json, {"experts": opened.records()}, "experts"):
        show(pool_table(opened))
    return 0


def audit(
    *,
    pool: options.PoolArgument,
    reader: options.ReaderOption = None,
    json: options.JsonOption = None,
) -> int:
    """Find experts that look unlike the others of a pool.

    Weights, gates, statistics and embeddings are compared with the pool's median, and whose example
    prompts each expert takes. The exit code is 1 with findings, 0 without. A finding is unusual,
    not proof of an attack.
    """
    opened = options.open_pool(pool)
    from ...analysis.audit import audit as run
    from ..tables import audit_table

    audited = run(opened, reader)
    if not report(json, audited.to_dict(), "numbers and findings"):
        show(audit_table(audited), width=140)
        for note in audited.notes:
            say(f"note: {note}")
        for finding in audited.findings:
            say(finding.message)
        if not audited.findings:
            say("nothing found")
    return int(bool(audited.findings))


def compose(
    *,
    pool: options.PoolArgument,
    out: Annotated[Path, "Folder of the routed model."],
    opening: options.ModelOptions,
) -> None:
    """Make a routed model of a pool and save it.

    Experts that look unlike the others are a warning ('phatgoose audit' says more).
    """
    options.warn_of_unused_k(opening.routing)
    require_free(out, RoutingError, options.ANOTHER_OUT)
    options.require_there(opening.base)
    opened = opening.open_pool(pool)
    from ...analysis.audit import audit as look
    from ...routing.compose import compose, composition_of, save

    base = opening.load(opened.base)
    try:
        unusual = look(opened).summary
    except RoutingError as error:  # a kind of expert that can be composed but not compared
        unusual = f"The pool wasn't searched for unusual experts. {str(error).partition(';')[0]}."
    if unusual:
        warnings.warn(unusual, stacklevel=2)
    model = compose(opened, base, routing=opening.routing, scores=opening.scores)
    save(model, out)
    parts = composition_of(model)
    count = len(parts.experts)
    k = min(parts.router.k, count)
    line = "1 expert" if count == 1 else f"{count} experts"
    line += f" at {len(parts.layers)} sites, router {parts.router.text}"
    if k:
        line += f", k = {k}"
    say(f"{line} -> {out}")


def route(
    *,
    pool: Annotated[str, typer.Argument(help="A pool: folder or hub:OWNER/NAME.")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Prompts, or files of them: a .txt with one a line, or JSONL, also of chats "
            "(messages). By default the standard input, one a line."
        ),
    ] = None,
    routing: Annotated[Routing, "kernel"],
    explain: Annotated[bool, "Show the nearest example prompts of expert and runner-up."] = False,
    json: options.JsonOption = None,
) -> None:
    """Choose a pool's experts for prompts; no base is loaded, and nothing is answered."""
    check_known(routing.router)
    opened = options.open_pool([Path(pool)])
    from ...routing.chooser import Chooser
    from ...tasks.loading import read_inputs
    from ..tables import choices_table

    lines = list[str]()
    if not prompts:
        with reading("the standard input", TaskError):
            lines += filter(None, map(str.strip, sys.stdin))
    inputs = lines or read_inputs(prompts or ())
    chooser = Chooser.open(opened, **vars(routing))
    choices = [chooser.choose(text, explain=explain) for text in inputs]
    rows = [{"prompt": text, **row.to_dict()} for text, row in zip(inputs, choices, strict=True)]
    if not report(json, {"choices": rows}, "choices"):
        show(choices_table(inputs, choices))
    if explain and not opened.prompts:
        say("no expert of this pool brings example prompts (prompts.txt)", err=True)


def prompts(
    *,
    pool: Annotated[Path, typer.Argument(help="A pool's folder.")],
    prompt: Annotated[str | None, typer.Argument(help="One that --expert should answer.")] = None,
    expert: Annotated[str | None, "The expert that should answer the prompt."] = None,
    take_back: Annotated[list[int] | None, "The number of a correction to remove."] = None,
    json: options.JsonOption = None,
) -> None:
    """List a pool's example prompts and corrections; add a correction, or take some back."""
    if (prompt is None) != (expert is None):
        raise ConfigError("A correction is a prompt and its --expert; give both.")
    opened = options.open_pool([pool])
    from ...experts.corrections import Correction, correct, corrections_in
    from ...experts.corrections import take_back as take

    if prompt is not None and expert is not None:
        check_text(prompt)
        opened.select([expert])
        correct(pool, Correction(expert, prompt))
    if take_back:
        take(pool, take_back)
    brought = [(name, text) for name, one in opened.items() for text in one.prompts]
    corrections = [(row.expert, row.prompt) for row in corrections_in(pool)]
    if not report(json, {"prompts": brought, "corrections": corrections}, "prompts"):
        for name, text in brought:
            say(f"   {name}: {one_line(text, 100)}")
        for number, (name, text) in enumerate(corrections, start=1):
            say(f"{number:2} {name}: {one_line(text, 100)}")


NewTokens = Annotated[int, "Maximum new tokens.", AT_LEAST_1]


@dataclass(frozen=True)
class AnswerOptions(options.ModelOptions):
    max_new_tokens: NewTokens = 64
    formatting: PromptFormatting = field(default_factory=PromptFormatting)


def generate(
    *,
    model: options.ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue or answer.")],
    how: AnswerOptions,
    show_experts: Annotated[
        bool, "Colour each token by its top expert, and print each expert's share of the tokens."
    ] = False,
    answer: Annotated[str | None, "With --show-experts: this answer, not the model's own."] = None,
    json: options.JsonOption = None,
) -> None:
    """Generate text with a routed model, and show which experts served each token."""
    options.only_with("with --show-experts", show_experts, {"answer": answer})
    check_text(prompt)
    if answer is not None:
        check_text(answer, "The answer")
    opened = how.open(model)
    from ..generation import explain, form_for
    from ..generation import generate as run

    form = form_for(opened, how.formatting)
    content = {}
    explanation = None
    if show_experts:
        explanation = explain(
            opened.model, opened.tokenizer, prompt, answer, how.max_new_tokens, form
        )
        text = explanation.answer
        content = explanation.to_dict()
    else:
        text = run(opened.model, opened.tokenizer, prompt, how.max_new_tokens, form)
    if not text:
        other = "--no-chat" if form.chat else "--chat"
        say(f"the model ended its answer at once; {other} may help", err=True)
    if report(json, {"prompt": prompt, "text": text, **content}, "answer"):
        return
    if explanation is None:
        show(text, wrap=False)
    else:
        show(*explanation.coloured())
        say(dumps(explanation.summary, ensure_ascii=False))


def evaluate(
    *,
    model: options.ModelArgument,
    task: Annotated[list[str], "Task file or hub:DATASET (repeatable)."],
    opening: options.ModelOptions,
    template: options.TemplateOptions,
    scoring: ScoringSettings,
    json: options.JsonOption = None,
) -> None:
    """Score a model zero-shot on tasks."""
    tasks = [template.load(source) for source in task]
    refuse_twice("tasks", (row.name for row in tasks))
    opened = opening.open(model)
    from ...evaluation.evaluate import evaluate as run
    from ..tables import scores_table

    result = run(opened.model, tasks, tokenizer=opened.tokenizer, **vars(scoring))
    if not report(json, result.to_dict(predictions=True), "scores"):
        show(scores_table(result, model))


def demo(
    base: options.BaseOption = None,
    out: Annotated[Path, "Folder of the demo's results."] = Path("demo"),
    all_methods: Annotated[bool, "Show every router in the table, not a few."] = False,
) -> None:
    """Train five small experts, route them, score them on held-out tasks."""
    options.require_there(base)
    from ..demo import run_demo

    run_demo(base or SMOLLM2, out, all_methods=all_methods)


FolderArgument = Annotated[Path, typer.Argument(help="A routed model's folder.")]


def add(
    model: FolderArgument, places: options.PoolArgument, reader: options.ReaderOption = None
) -> None:
    """Add experts to a routed model's folder."""
    require_folder(model, RoutingError, ROUTED_INFO)
    pool = options.open_pool(places)
    from ...routing.saved import add_to_saved

    saved = add_to_saved(model, pool, reader)
    say(f"{len(saved.names)} experts at {len(saved.sizes)} sites -> {model}")


def remove(
    model: FolderArgument, names: Annotated[list[str], typer.Argument(help="The experts' names.")]
) -> None:
    """Remove experts from a routed model's folder."""
    require_folder(model, RoutingError, ROUTED_INFO)
    from ...routing.saved import remove_from_saved

    saved = remove_from_saved(model, names)
    say(f"{len(saved.names)} experts at {len(saved.sizes)} sites -> {model}")
