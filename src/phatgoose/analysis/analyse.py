"""The analysis of a routed model on tasks, or of one pool under several routers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.identity import Base
from ..config import Routing, ScoringSettings
from ..errors import ConfigError
from ..evaluation.evaluate import TaskScore, evaluate, tokenizer_of
from ..experts.pool import Pool
from ..routing.compose import (
    check_composable,
    compose,
    composition_of,
    detach,
    resolve_base,
    routing_for,
)
from ..routing.opening import is_routed, open_model
from ..routing.routers.auto import resolved
from ..routing.routers.fixed import read_scores
from ..routing.routers.router import Scores, class_of
from ..tasks.encoding import Encoder
from ..tasks.loading import given_tasks
from ..tasks.task import Task, refuse_twice
from .distribution import MEASURES, PARTS, Measure, RoutingDistribution, read_task
from .findings import Finding
from .measures import (
    ORACLE,
    SMOOTHING,
    Array,
    Correlation,
    Divergence,
    concentration,
    correlation,
    effective_experts,
    entropy,
    kl_divergence,
    oracle_experts,
)
from .traces import Trace, trace


@dataclass(frozen=True)
class RouterAnalysis:
    """What `analyse` found for one router.

    Attributes:
        distributions: Of the experts, by dataset.
        scores: By dataset, empty if not scored.
        findings: Warnings about the routing.
        traces: Texts token by token, by dataset.
        choices: Weights of each prompt's experts by dataset, [prompts, E], in no order of the
            data's; empty for a router that chooses for every token.
    """

    distributions: Mapping[str, RoutingDistribution]
    scores: Mapping[str, TaskScore] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    traces: Mapping[str, Sequence[Trace]] = field(default_factory=dict)
    choices: Mapping[str, Array] = field(default_factory=dict)

    def by_dataset(self, measure: Measure = "weight") -> dict[str, Array]:
        """The whole-model distribution on each dataset, [E]."""
        return {name: spread.whole(measure) for name, spread in self.distributions.items()}

    def mean(self, measure: Measure = "weight") -> Array:
        """Its unweighted mean over datasets, [E]."""
        return np.asarray(np.mean(list(self.by_dataset(measure).values()), axis=0))

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON: all numbers, no text of the data."""
        return {
            "scores": {task: score.to_dict() for task, score in self.scores.items()},
            "datasets": {task: _numbers(spread) for task, spread in self.distributions.items()},
            "findings": list(map(asdict, self.findings)),
            "choices": _plain(self.choices),
        }


@dataclass(frozen=True)
class Analysis:
    """What `analyse` returns. KL divergences are of whole-model distributions before top-k.

    Attributes:
        experts: The experts' names, in the order of every distribution.
        datasets: The tasks' names.
        routers: What was found for each router.
        oracle: The best single expert of each dataset, empty without scores of single experts.
        settings: How everything was read.
    """

    experts: tuple[str, ...]
    datasets: tuple[str, ...]
    routers: Mapping[str, RouterAnalysis]
    oracle: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)

    def __repr__(self) -> str:
        sizes = f"experts: {len(self.experts)}, datasets: {len(self.datasets)}"
        return f"<Analysis of {', '.join(self.routers)} ({sizes})>"

    def distribution(self, router: str, dataset: str) -> Array:
        """A router's whole-model distribution on a dataset, [E]; for ORACLE its one expert."""
        if router == ORACLE and ORACLE not in self.routers:
            chosen = np.zeros(len(self.experts))
            chosen[self.experts.index(self.oracle[dataset])] = 1
            return chosen
        return self.routers[router].distributions[dataset].whole("probability")

    def divergence(self, router: str, other: str, dataset: str) -> Divergence:
        """The KL divergences between two routers, or a router and ORACLE, on a dataset."""
        p = self.distribution(router, dataset)
        q = self.distribution(other, dataset)
        return Divergence(kl_divergence(p, q), kl_divergence(q, p))

    def correlation(self, router: str, other: str = ORACLE) -> Correlation | None:
        """The correlation of KL(router‖other) with the router's score over datasets (paper 4.4).

        None without scores, or without an Oracle to compare with.
        """
        scores = self.routers[router].scores
        if not scores or (other == ORACLE and not self.oracle):
            return None
        divergences = [self.divergence(router, other, dataset).to for dataset in self.datasets]
        return correlation(divergences, [scores[dataset].score for dataset in self.datasets])

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON: all numbers, no text of the data."""
        others = list(self.routers)
        if self.oracle and ORACLE not in others:
            others.append(ORACLE)
        divergences = []
        correlations = []
        for router, other in product(self.routers, others):
            if router == other:
                continue
            pair = {"router": router, "other": other}
            for dataset in self.datasets:
                divergence = self.divergence(router, other, dataset)
                divergences.append({**pair, "dataset": dataset, **asdict(divergence)})
            correlation = self.correlation(router, other)
            if correlation:
                correlations.append({**pair, **asdict(correlation)})
        return {
            "format": "phatgoose-analysis-1",
            "settings": self.settings,
            "smoothing": SMOOTHING,
            "experts": self.experts,
            "datasets": self.datasets,
            "oracle": self.oracle,
            "routers": {name: router.to_dict() for name, router in self.routers.items()},
            "divergences": divergences,
            "correlations": correlations,
        }


def _numbers(spread: RoutingDistribution) -> dict[str, object]:
    numbers: dict[str, object] = {
        "tokens": {part: spread.passed(part) for part in PARTS},
        "token_entropy": spread.token_entropy(),
    }
    for measure in MEASURES:
        numbers[measure] = spread.whole(measure).tolist()
    numbers["by_part"] = {part: spread.whole("weight", part).tolist() for part in PARTS}
    numbers["by_layer"] = _plain(spread.by_layer())
    numbers["by_kind"] = _plain(spread.by_kind())
    numbers["by_site"] = {
        "probability": _plain(spread.by_site("probability")),
        "weight": _plain(spread.by_site("weight")),
    }
    weights = spread.whole("weight")
    numbers["entropy"] = entropy(weights)
    numbers["effective_experts"] = effective_experts(weights)
    numbers["concentration"] = concentration(weights)
    return numbers


def _plain(rows: Mapping[str, Array]) -> dict[str, object]:
    return {name: row.tolist() for name, row in rows.items()}


DOMINANT = 0.8  # an expert that is first choice more often than this takes everything


def findings_of(distributions: Mapping[str, RoutingDistribution]) -> Iterator[Finding]:
    """What looks wrong in one router's `distributions` by dataset, worst first."""
    experts = next(iter(distributions.values())).experts
    first = np.mean([spread.whole("first") for spread in distributions.values()], axis=0)
    where = "on 1 dataset"
    if len(distributions) > 1:
        where = f"on {len(distributions)} datasets"
    best = experts[int(first.argmax())]
    if len(experts) > 1 and first.max() > DOMINANT:
        yield Finding(
            "takes-everything",
            f"{best} is the first choice of {first.max():.0%} of all decisions {where}: the pool "
            f"is routed almost as {best} alone. Compare with --router single:expert={best}.",
            (best,),
        )
    for name, share in zip(experts, first, strict=True):
        if share == 0:
            yield Finding(
                "never-wins",
                f"{name} is never the first choice {where}. Its gate may be untrained, or its data "
                f"far from these; train the gate again (phatgoose gate) or --leave-out {name}.",
                (name,),
            )


@dataclass(frozen=True)
class AnalysisSettings(ScoringSettings):
    """What is analysed, and how tasks are read and scored (`ScoringSettings`).

    Attributes:
        routers: A pool is composed for each of these in turn; by default the one of `routing`.
        routing: All other settings of routing.
        scores: Of single experts, as in `compose`: they determine the Oracle to compare with.
        score: Evaluate each router on the examples too.
        examples: Texts of each task to trace token by token.
    """

    routers: Sequence[str] | str = ()
    routing: Routing = field(default_factory=Routing)
    scores: Scores | str | Path | None = None
    score: bool = True
    examples: int = 1


def analyse(
    source: PreTrainedModel | Pool | str | Path,
    tasks: Task | str | Path | Iterable[Task | str | Path],
    *,
    base: Base | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> Analysis:
    """Which experts serve the tokens of `tasks` in a routed model, or a pool under `routers`.

    Every router reads the prompt and the right answer of the same examples.

    Args:
        source: A routed model or its folder, or a pool.
        tasks: Tasks, files, or `hub:DATASET`; one or several.
        base: A loaded base or its name; None loads the one that is recorded.
        tokenizer: None takes that of the model or its base.
        settings: Those of `AnalysisSettings`, such as `routers` or `limit`.

    Raises:
        ConfigError: `routers` with a composed model.
        TaskError: Two tasks of one name.
        RoutingError: The model is not routed.
        PhatgooseError: What composing and evaluating raise. All of these come before the first
            router reads anything, but for what scoring refuses of a task's examples.
    """
    how = AnalysisSettings(**settings)
    scores = how.scores
    if isinstance(scores, str | Path):
        scores = read_scores(scores)
    tasks = given_tasks(tasks)
    datasets = tuple(task.name for task in tasks)
    refuse_twice("tasks", datasets)
    subject = _opened(source, base, tokenizer, how, scores)
    oracle = oracle_experts(scores, subject.experts, datasets)
    scoring = {setting.name: getattr(how, setting.name) for setting in fields(ScoringSettings)}

    analyses = {}
    for name, opened in subject.models.items():
        with opened as model:
            analysis = _read(model, subject, tasks, how)
            if how.score:
                results = evaluate(model, tasks, tokenizer=subject.tokenizer, **scoring).scores
                analysis = replace(analysis, scores={score.task: score for score in results})
            analyses[name] = analysis
    return Analysis(
        experts=subject.experts,
        datasets=datasets,
        routers=analyses,
        oracle=oracle,
        settings={
            "routing": asdict(subject.routing),
            "limit": how.limit,
            "seed": how.seed,
            "formatting": asdict(how.formatting),
        },
    )


class _Subject(NamedTuple):
    """What is analysed: by router the context in which a routed model has it."""

    experts: tuple[str, ...]
    routing: Routing
    tokenizer: PreTrainedTokenizerBase
    models: Mapping[str, AbstractContextManager[PreTrainedModel]]


@contextmanager
def _composed(
    pool: Pool, base: Base, routing: Routing, scores: Scores | None
) -> Iterator[PreTrainedModel]:
    model = compose(pool, base, routing=routing, scores=scores)
    try:
        yield model
    finally:
        detach(model)


def _opened(
    source: PreTrainedModel | Pool | str | Path,
    base: Base | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    how: AnalysisSettings,
    scores: Scores | None,
) -> _Subject:
    if isinstance(source, PreTrainedModel):
        _refuse_routers(how)
        return _routed(source, tokenizer)
    if not isinstance(source, Pool) and is_routed(source):
        _refuse_routers(how)
        opened = open_model(source, base, routing=how.routing)
        return _routed(opened.model, tokenizer or opened.tokenizer)
    pool = Pool.open(source)
    loaded = resolve_base(base, pool.base)
    pool = pool.measured(how.routing.reader)
    routers = [how.routers] if isinstance(how.routers, str) else how.routers
    routings: dict[str, Routing] = {}
    for name in routers or (how.routing.router,):
        routing = resolved(replace(how.routing, router=name), pool, loaded.tokenizer)
        if routings:  # the first is composed before anything is read
            check_composable(pool, routing, scores)
        routings.setdefault(routing.router, routing)
    models = {name: _composed(pool, loaded, row, scores) for name, row in routings.items()}
    first = next(iter(routings.values()))
    return _Subject(pool.names, first, tokenizer or loaded.tokenizer, models)


def _refuse_routers(how: AnalysisSettings) -> None:
    if how.routers:
        raise ConfigError("Several routers need a pool; this model has its router already.")


def _routed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> _Subject:
    parts = composition_of(model)
    models = {parts.routing.router: nullcontext(model)}
    return _Subject(parts.experts, parts.routing, tokenizer or tokenizer_of(model), models)


def _read(
    model: PreTrainedModel, subject: _Subject, tasks: Sequence[Task], how: AnalysisSettings
) -> RouterAnalysis:
    """All but the scores of the router of `model`."""
    encoder = Encoder.for_model(model, subject.tokenizer, how.formatting)
    model.eval()
    distributions = {}
    choices = {}
    traces = {}
    for task in tasks:
        task = replace(task, test=task.evaluation_examples(how.limit, how.seed))
        spread, chosen = read_task(model, encoder, task, subject.experts, how.token_budget)
        distributions[task.name] = spread
        if len(chosen):
            choices[task.name] = chosen
        traces[task.name] = _traces(model, encoder, task, how.examples)
    kind = class_of(composition_of(model).routing.router)
    findings = tuple[Finding, ...]()
    if kind.needs and not kind.per_input:
        findings = tuple(findings_of(distributions))
    return RouterAnalysis(distributions, {}, findings, traces, choices)


def _traces(model: PreTrainedModel, encoder: Encoder, task: Task, most: int) -> list[Trace]:
    examples = task.test[:most]
    pairs = encoder.pairs(examples)
    prompts = [pair.prompt for pair in pairs]
    traces = []
    with routing_for(model, prompts, task=task.name, examples=examples) as before_pass:
        for index, pair in enumerate(pairs):
            before_pass([index])
            traces.append(trace(model, encoder, pair))
    return traces
