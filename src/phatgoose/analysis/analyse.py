"""The analysis of a routed model, or of one pool under several routers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.loading import Base, load_base
from ..config import Formatting, Routing
from ..errors import ConfigError, TaskError
from ..evaluation.evaluate import MAX_NEW_TOKENS, TOKEN_BUDGET, Evaluation, evaluate
from ..experts.pool import Pool
from ..routing.compose import compose, detach, serving
from ..routing.composition import composition_of
from ..routing.open_model import is_routed, open_model
from ..routing.routers.scores import Scores, best_expert_by_task, read_scores
from ..tasks.encoding import Encoder
from ..tasks.task import Task
from .agreement import DecisionFiles, agreement
from .findings import findings_of, vector_similarity
from .importance import Effect, leave_one_out
from .measures import SMOOTHING, smoothed
from .reading import Observer, read_examples
from .result import Analysis, RouterAnalysis
from .routing_distribution import RoutingProfile, RoutingTally
from .traces import Trace, trace

__all__ = ["analyse"]


def analyse(
    source: PreTrainedModel | Pool | str | Path,
    tasks: Task | Iterable[Task],
    *,
    routers: Sequence[str] | None = None,
    routing: Routing | None = None,
    base: Base | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scores: Scores | str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    formatting: Formatting | None = None,
    score: bool = True,
    without_each: bool = False,
    examples: int = 1,
    smoothing: float = SMOOTHING,
    max_new_tokens: int = MAX_NEW_TOKENS,
    token_budget: int = TOKEN_BUDGET,
) -> Analysis:
    """Where the tokens of `tasks` go in a routed model, or in a pool under each of `routers`.

    `source` is a routed model or its folder, or a pool (folder, manifest); a pool is composed for
    each of `routers` in turn (None: the one that `routing` names), whose other settings are those
    of `routing`. Every router reads the prompt and the right answer of the same examples (`limit`
    drawn by `seed`). With `score` each is evaluated on them too, and `without_each` evaluates the
    first router without each expert in turn (pools only). `scores` of single experts, as in
    `compose`, tell the Oracle to compare with. `examples` texts of each task are traced token by
    token. `smoothing` is that of the KL divergences.

    Raises ConfigError for `routers` or `without_each` with a model that is composed already,
    TaskError for no task or two of one name, RoutingError for a model that is not routed, and what
    composing and evaluating raise.
    """
    tasks = _named_apart([tasks] if isinstance(tasks, Task) else list(tasks))
    smoothed([1.0], smoothing)  # refuse a bad one before the work
    protocol = _Protocol(limit, seed, formatting, score, examples, max_new_tokens, token_budget)
    scores = read_scores(scores) if isinstance(scores, str | Path) else scores
    subject = _subject(source, routers, routing or Routing(), base, tokenizer, scores)
    if without_each and (subject.without is None or not score):
        raise ConfigError("Leaving experts out in turn needs a pool, and scores.")
    found: dict[str, RouterAnalysis] = {}
    evaluations: dict[str, Evaluation | None] = {}
    with tempfile.TemporaryDirectory(prefix="phatgoose-") as folder:
        for name in subject.routers:
            with subject.opened(name) as model:
                files = Path(folder) / name if len(subject.routers) > 1 else None
                found[name], evaluations[name] = _one_router(
                    name, model, subject, tasks, protocol, files
                )
        agreements = {
            (a, b): common
            for a, b in combinations(found, 2)
            if (common := agreement(Path(folder) / a, Path(folder) / b, len(subject.experts)))
        }
    effects = _effects(subject, tasks, protocol, evaluations) if without_each else []
    return Analysis(
        experts=subject.experts,
        datasets=tuple(task.name for task in tasks),
        routers=found,
        oracle=_oracle(scores, subject.experts, tasks),
        agreements=agreements,
        effects=tuple(effects),
        smoothing=smoothing,
        settings={
            "routing": asdict(subject.routing),
            "limit": limit,
            "seed": seed,
            "formatting": asdict(formatting or Formatting()),
        },
    )


@dataclass(frozen=True)
class _Protocol:
    """How every router is looked at."""

    limit: int | None
    seed: int
    formatting: Formatting | None
    score: bool
    examples: int
    max_new_tokens: int
    token_budget: int

    def evaluate(
        self, model: PreTrainedModel, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase
    ) -> Evaluation:
        """The scores of `model`."""
        return evaluate(
            model,
            tasks,
            tokenizer=tokenizer,
            limit=self.limit,
            seed=self.seed,
            formatting=self.formatting,
            max_new_tokens=self.max_new_tokens,
            token_budget=self.token_budget,
        )


@dataclass(frozen=True)
class _Subject:
    """What is analysed: `opened(router)` is the routed model while its context is open.

    `without(router, expert)` likewise, without an expert; None where that can't be done.
    """

    experts: tuple[str, ...]
    routers: tuple[str, ...]
    routing: Routing
    tokenizer: PreTrainedTokenizerBase
    opened: Callable[[str], AbstractContextManager[PreTrainedModel]]
    without: Callable[[str, str], AbstractContextManager[PreTrainedModel]] | None = None


def _subject(
    source: PreTrainedModel | Pool | str | Path,
    routers: Sequence[str] | None,
    routing: Routing,
    base: Base | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    scores: Scores | None,
) -> _Subject:
    if isinstance(source, PreTrainedModel) or (
        isinstance(source, str | Path) and is_routed(source)
    ):
        if routers:
            raise ConfigError("Several routers need a pool; this model has its router already.")
        return _composed_subject(source, routing, base, tokenizer)
    pool = source if isinstance(source, Pool) else Pool.open(source)
    if not isinstance(base, Base):
        name, revision = (base, None) if base else (pool.base.id, pool.base.revision)
        base = load_base(name, revision=revision)
    loaded = base

    @contextmanager
    def opened(router: str, members: Pool = pool) -> Iterator[PreTrainedModel]:
        options = asdict(replace(routing, router=router))
        options["expert"] = routing.expert if router == "single" else None
        model = compose(members, loaded, scores=scores, **options)
        try:
            yield model
        finally:
            detach(model)

    return _Subject(
        pool.names,
        tuple(dict.fromkeys(routers or (routing.router,))),
        routing,
        tokenizer or loaded.tokenizer,
        opened,
        lambda router, expert: opened(router, pool.select(leave_out=[expert])),
    )


def _composed_subject(
    source: PreTrainedModel | str | Path,
    routing: Routing,
    base: Base | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> _Subject:
    if isinstance(source, str | Path):
        opened = open_model(source, base, routing=routing)
        source, tokenizer = opened.model, tokenizer or opened.tokenizer
    model, parts = source, composition_of(source)
    tokenizer = tokenizer or parts.tokenizer
    if tokenizer is None:
        raise ConfigError("The model came without its tokenizer; pass it.")

    @contextmanager
    def already(_: str) -> Iterator[PreTrainedModel]:
        yield model

    return _Subject(parts.experts, (parts.routing.router,), parts.routing, tokenizer, already)


def _one_router(
    name: str,
    model: PreTrainedModel,
    subject: _Subject,
    tasks: Sequence[Task],
    protocol: _Protocol,
    files: Path | None,
) -> tuple[RouterAnalysis, Evaluation | None]:
    """(what one router does with the tasks, its evaluation if it was scored)."""
    parts = composition_of(model)
    encoder = Encoder.for_model(model, subject.tokenizer, protocol.formatting)
    model.eval()
    index = torch.tensor([subject.experts.index(expert) for expert in parts.experts])
    decisions = [DecisionFiles(files, index)] if files is not None else []
    profiles: dict[str, RoutingProfile] = {}
    for task in tasks:
        chosen = task.evaluation_examples(protocol.limit, protocol.seed)
        present = {site: layer.experts for site, layer in parts.layers.items()}
        tally = RoutingTally(parts.experts, present)
        observers: list[Observer] = [tally, *decisions]
        read_examples(model, encoder, task.name, chosen, observers, protocol.token_budget)
        profiles[task.name] = tally.profile.over(subject.experts)
    evaluation = protocol.evaluate(model, tasks, subject.tokenizer) if protocol.score else None
    similarity = vector_similarity(model)
    found = RouterAnalysis(
        profiles,
        {score.task: score for score in evaluation.scores} if evaluation else {},
        tuple(findings_of(profiles, similarity)),
        {task.name: _traces(model, encoder, task, protocol) for task in tasks},
        similarity,
    )
    return found, evaluation


def _traces(
    model: PreTrainedModel, encoder: Encoder, task: Task, protocol: _Protocol
) -> list[Trace]:
    chosen = task.evaluation_examples(protocol.limit, protocol.seed)[: protocol.examples]
    traces = []
    with serving(model, task.name, chosen, protocol.formatting) as before_pass:
        for index, example in enumerate(chosen):
            before_pass([index])
            pair = encoder.pair(example.input, example.target, example.passage)
            traces.append(trace(model, encoder, pair))
    return traces


def _effects(
    subject: _Subject,
    tasks: Sequence[Task],
    protocol: _Protocol,
    evaluations: Mapping[str, Evaluation | None],
) -> list[Effect]:
    router = subject.routers[0]
    everyone, reduced = evaluations[router], subject.without
    if everyone is None or reduced is None:
        return []

    def without(expert: str) -> Evaluation:
        with reduced(router, expert) as model:
            return protocol.evaluate(model, tasks, subject.tokenizer)

    return leave_one_out(everyone, subject.experts, without)


def _oracle(scores: Scores | None, experts: Sequence[str], tasks: Sequence[Task]) -> dict[str, str]:
    """The best expert of each task. Raises ConfigError when one of them has no scores."""
    if scores is None:
        return {}
    best = best_expert_by_task(scores, experts)
    for task in tasks:
        if task.name not in best:
            raise ConfigError(
                f"The scores of single experts don't have task {task.name!r}; they have "
                f"{', '.join(sorted(best))}."
            )
    return {task.name: best[task.name] for task in tasks}


def _named_apart(tasks: Sequence[Task]) -> list[Task]:
    names = [task.name for task in tasks]
    if not names:
        raise TaskError("No task was given to analyse.")
    for name in names:
        if names.count(name) > 1:
            raise TaskError(f"Two tasks are called {name!r}; give them different names.")
    return list(tasks)
