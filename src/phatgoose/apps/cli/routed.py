"""Commands of aggregators: pool, compose, generate, evaluate, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...config import Formatting, Routing
from ...errors import RoutingError
from ..console.printing import say, show
from .options import (
    BaseOption,
    ModelArgument,
    ModelOptions,
    PoolArgument,
    ScoringOptions,
    StoredOption,
    TemplateOptions,
    open_pool,
)

__all__ = ["compose", "demo", "evaluate", "generate", "pool"]


def pool(
    places: PoolArgument,
    out: Annotated[Path | None, "Write a manifest (.json) here."] = None,
    duplicates: Annotated[
        float | None, "List pairs of experts whose updates have at least this cosine, such as 0.99."
    ] = None,
) -> None:
    """List a pool's experts; with --out write a manifest."""
    from ...analysis.near_duplicates import near_duplicates
    from ..console.tables import duplicates_table, pool_table

    opened = open_pool(places)
    show(pool_table(opened))
    if duplicates is not None:
        show(duplicates_table(near_duplicates(opened, duplicates), duplicates))
    if out:
        opened.write_manifest(out)
        say(f"manifest -> {out}")


def compose(
    *,
    pool: PoolArgument,
    out: Annotated[Path, "Folder of the routed model."],
    opening: ModelOptions,
    stored: StoredOption = None,
    routing: Routing,
) -> None:
    """Make a routed model of a pool and save it.

    It is written site by site: the pool may be larger than memory.
    """
    if out.exists():
        raise RoutingError(f"{out} exists already; choose another --out.")
    from ...routing.routers.registry import spec_of
    from ...routing.saved.segments import save_pool

    opened = open_pool(pool).select(opening.keep, opening.leave_out)
    base = opening.load_for(opened)
    packed = save_pool(opened, out, base, routing=routing, scores=opening.scores, stored=stored)
    used = packed.routing
    k = f", k = {used.k}" if spec_of(used.router).uses_k else ""
    experts = f"{len(packed.names)} experts at {len(packed.sites)} sites"
    say(f"{experts}, router {used.router}{k} -> {out}")


def generate(
    *,
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue or answer.")],
    opening: ModelOptions,
    max_new_tokens: Annotated[int, "Tokens to generate at most.", {"min": 1}] = 64,
    sample: Annotated[bool, "Sample instead of greedy."] = False,
    temperature: Annotated[float, "Temperature when sampling.", {"min": 1e-3}] = 1.0,
    seed: Annotated[int, "Seed when sampling."] = 0,
    show_experts: Annotated[bool, "Colour each token by its top expert."] = False,
    routing: Routing,
    formatting: Formatting,
) -> None:
    """Generate text with a routed model."""
    from ..generation import Sampling, recorded_tokens
    from ..generation import generate as run

    opened = opening.open(model, routing)
    sampling = Sampling(max_new_tokens, temperature if sample else None, seed)
    result = run(opened.model, opened.tokenizer, prompt, formatting, sampling, record=show_experts)
    if result.recording is None:
        show(result.text, wrap=False)
    else:
        show(recorded_tokens(result, opened.tokenizer))


def evaluate(
    *,
    model: ModelArgument,
    task: Annotated[list[str], "Task file or hub:DATASET (repeatable)."],
    opening: ModelOptions,
    template: TemplateOptions,
    scoring: ScoringOptions,
    json: Annotated[Path | None, "Write scores and predictions here."] = None,
    routing: Routing,
    formatting: Formatting,
) -> None:
    """Score a model zero-shot on tasks."""
    from ...evaluation.evaluate import evaluate as run
    from ..console.tables import scores_table

    tasks = [template.load(source) for source in task]
    opened = opening.open(model, routing)
    result = run(
        opened.model, tasks, tokenizer=opened.tokenizer, formatting=formatting, **vars(scoring)
    )
    show(scores_table(result, model))
    if json:
        result.write_json(json, predictions=True)
        say(f"scores -> {json}")


def demo(
    base: BaseOption = None, out: Annotated[Path, "Folder of the demo's results."] = Path("demo")
) -> None:
    """Train five small experts, route them, score them on unseen tasks."""
    from ..demo.demo import run_demo

    run_demo(base or "smollm2", out)
