"""The analysis of a routed model on tasks, or of one pool under several routers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base import Base
from ..config import Formatting, Routing
from ..errors import ConfigError, EvaluationError, TaskError
from ..evaluation.evaluate import (
    MAX_NEW_TOKENS,
    TOKEN_BUDGET,
    Evaluation,
    ScoringSettings,
    TaskScore,
    evaluate,
    tokenizer_of,
)
from ..experts.pool import Pool
from ..files import write_text
from ..routing.compose import compose, detach, is_routed, open_model
from ..routing.composition import composition_of, resolve_base, routing_for
from ..routing.routers.auto import settled
from ..routing.routers.fixed import read_scores
from ..routing.routers.prompt import ByPrompt
from ..routing.routers.registry import WEIGHTS, class_of, router_of
from ..routing.routers.router import Scores, check_routing
from ..tasks.encoding import Encoder
from ..tasks.loading import given_tasks
from ..tasks.task import Task, named_apart
from .distribution import (
    MEASURES,
    PARTS,
    Measure,
    RoutingDistribution,
    RoutingTally,
    read_examples,
)
from .measures import (
    ORACLE,
    SMOOTHING,
    Correlation,
    Divergence,
    Effect,
    Finding,
    concentration,
    correlation,
    effective_experts,
    entropy,
    kl_divergence,
    leave_one_out,
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
    choices: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def by_dataset(self, measure: Measure = "weight") -> dict[str, NDArray[np.float64]]:
        """The whole-model distribution on each dataset, [E]."""
        return {name: each.whole(measure) for name, each in self.distributions.items()}

    def mean(self, measure: Measure = "weight") -> NDArray[np.float64]:
        """Its unweighted mean over datasets, [E]."""
        return np.asarray(np.mean(list(self.by_dataset(measure).values()), axis=0))


@dataclass(frozen=True)
class Analysis:
    """What `analyse` returns. KL divergences are of whole-model distributions before top-k.

    Attributes:
        experts: The experts' names, in the order of every distribution.
        datasets: The tasks' names.
        routers: What was found for each router.
        oracle: The best single expert of each dataset, empty without scores of single experts.
        effects: Those of leaving experts out, if asked for.
        settings: How everything was read.
    """

    experts: tuple[str, ...]
    datasets: tuple[str, ...]
    routers: Mapping[str, RouterAnalysis]
    oracle: Mapping[str, str] = field(default_factory=dict)
    effects: tuple[Effect, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        sizes = f"experts: {len(self.experts)}, datasets: {len(self.datasets)}"
        return f"<Analysis of {', '.join(self.routers)} ({sizes})>"

    def distribution(self, router: str, dataset: str) -> NDArray[np.float64]:
        """A router's whole-model distribution on a dataset, [E]; for ORACLE its one expert."""
        if router == ORACLE and ORACLE not in self.routers:
            chosen = np.zeros(len(self.experts))
            chosen[self.experts.index(self.oracle[dataset])] = 1
            return chosen
        return self.routers[router].distributions[dataset].whole("probability")

    def divergence(self, router: str, other: str, dataset: str) -> Divergence:
        """The KL divergences between two routers, or a router and ORACLE, on a dataset."""
        p, q = self.distribution(router, dataset), self.distribution(other, dataset)
        return Divergence(kl_divergence(p, q), kl_divergence(q, p))

    def correlation(self, router: str, other: str = ORACLE) -> Correlation | None:
        """The correlation of KL(router‖other) with the router's score over datasets (paper 4.4), or
        None.
        """
        scores = self.routers[router].scores
        if not scores or (other == ORACLE and not self.oracle):
            return None
        divergences = [self.divergence(router, other, dataset).to for dataset in self.datasets]
        return correlation(divergences, [scores[dataset].score for dataset in self.datasets])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: all numbers, no text of the data."""
        oracle = [ORACLE] if self.oracle and ORACLE not in self.routers else []
        pairs = [(a, b) for a in self.routers for b in (*self.routers, *oracle) if a != b]
        return {
            "format": "phatgoose-analysis-1",
            "settings": dict(self.settings),
            "smoothing": SMOOTHING,
            "experts": list(self.experts),
            "datasets": list(self.datasets),
            "oracle": dict(self.oracle),
            "routers": {name: _plain_router(router) for name, router in self.routers.items()},
            "divergences": [
                {"router": a, "other": b, "dataset": d, **asdict(self.divergence(a, b, d))}
                for a, b in pairs
                for d in self.datasets
            ],
            "correlations": [
                {"router": a, "other": b, **asdict(each)}
                for a, b in pairs
                if (each := self.correlation(a, b)) is not None
            ],
            "leave_one_out": [asdict(effect) for effect in self.effects],
        }

    def write_json(self, path: str | Path) -> None:
        """Write `to_dict`. Raises EvaluationError if that can't be done."""
        content = json.dumps(self.to_dict(), ensure_ascii=False) + "\n"
        write_text(Path(path), content, EvaluationError)


def _plain_router(router: RouterAnalysis) -> dict[str, Any]:
    scores = {
        task: {"metric": s.metric, "score": s.score, "low": s.low, "high": s.high, "n": s.n}
        for task, s in router.scores.items()
    }
    return {
        "scores": scores,
        "datasets": {task: _numbers(each) for task, each in router.distributions.items()},
        "findings": [asdict(finding) for finding in router.findings],
        "choices": {task: weights.tolist() for task, weights in router.choices.items()},
    }


def _numbers(spread: RoutingDistribution) -> dict[str, Any]:
    def plain(rows: Mapping[str, NDArray[np.float64]]) -> dict[str, list[float]]:
        return {name: row.tolist() for name, row in rows.items()}

    whole = spread.whole("weight")
    return {
        "tokens": {part: spread.passed(part) for part in PARTS},
        "token_entropy": spread.token_entropy(),
        **{measure: spread.whole(measure).tolist() for measure in MEASURES},
        "by_part": {part: spread.whole("weight", part).tolist() for part in PARTS},
        "by_layer": plain(spread.by_layer()),
        "by_kind": plain(spread.by_kind()),
        "by_site": {m: plain(spread.by_site(m)) for m in ("probability", "weight")},
        "entropy": entropy(whole),
        "effective_experts": effective_experts(whole),
        "concentration": concentration(whole),
    }


DOMINANT = 0.8  # an expert that is first choice more often than this takes everything


def findings_of(distributions: Mapping[str, RoutingDistribution]) -> Iterator[Finding]:
    """What looks wrong in one router's `distributions` by dataset, worst first."""
    experts = next(iter(distributions.values())).experts
    first = np.mean([each.whole("first") for each in distributions.values()], axis=0)
    where = f"on {len(distributions)} dataset{'s' if len(distributions) > 1 else ''}"
    best = experts[int(first.argmax())]
    if len(experts) > 1 and first.max() > DOMINANT:
        yield Finding(
            "takes-everything",
            f"{best} is the first choice of {first.max():.0%} of all decisions {where}: the pool "
            f"is routed almost as {best} alone. Compare with --router single:expert={best}.",
            (best,),
        )
    for name in (name for name, share in zip(experts, first, strict=True) if share == 0):
        yield Finding(
            "never-wins",
            f"{name} is never the first choice {where}. Its gate may be untrained, or its data far "
            f"from these; train the gate again (phatgoose gate) or --leave-out {name}.",
            (name,),
        )


def analyse(
    source: PreTrainedModel | Pool | str | Path,
    tasks: Task | str | Path | Iterable[Task | str | Path],
    *,
    routers: Sequence[str] | str | None = None,
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
    max_new_tokens: int = MAX_NEW_TOKENS,
    token_budget: int = TOKEN_BUDGET,
) -> Analysis:
    """Which experts serve the tokens of `tasks` in a routed model, or a pool under `routers`.

    Every router reads the prompt and the right answer of the same examples.

    Args:
        source: A routed model or its folder, or a pool.
        tasks: Tasks, files, or `hub:DATASET`; one or several.
        routers: A pool is composed for each of these in turn; None is the one that `routing` names.
        routing: All other settings; None is `Routing()`.
        base: A loaded base or its name; None loads the one that is recorded.
        tokenizer: None takes that of the model or its base.
        scores: Of single experts, as in `compose`: they determine the Oracle to compare with.
        limit: Maximum examples of each task, drawn by `seed`; None is all of them.
        seed: Seed of the draw.
        formatting: How inputs are cut and wrapped; None is `Formatting()`.
        score: Evaluate each router on the examples too.
        without_each: Evaluate the first router without each expert in turn (pools only).
        examples: Texts of each task to trace token by token.
        max_new_tokens: Maximum tokens of a generated answer, where a task sets none.
        token_budget: Maximum tokens of a batch.

    Raises:
        ConfigError: `routers` or `without_each` with a composed model.
        TaskError: No task, or two of one name.
        RoutingError: The model is not routed.
        PhatgooseError: What composing and evaluating raise. All of these come before the first
            router reads anything.
    """
    tasks = named_apart(given_tasks(tasks))
    if not tasks:
        raise TaskError("No task was given to analyse.")
    scoring = ScoringSettings(formatting or Formatting(), limit, seed, max_new_tokens, token_budget)
    scores = read_scores(scores) if isinstance(scores, str | Path) else scores
    routers, routing = [routers] if isinstance(routers, str) else routers, routing or Routing()
    subject = _subject(source, routers, routing, base, tokenizer, scores)
    able = subject.pool is not None and score and len(subject.experts) > 1
    if without_each and not (able and class_of(subject.routers[0]).name not in ("single", WEIGHTS)):
        raise ConfigError(
            "Leaving experts out in turn needs a pool of several, scores, and a first router that "
            "can do without the experts that it names."
        )
    datasets = tuple(task.name for task in tasks)
    oracle = oracle_experts(scores, subject.experts, datasets)

    def evaluated(model: PreTrainedModel) -> Evaluation:
        return evaluate(model, tasks, tokenizer=subject.tokenizer, **vars(scoring))

    def without(expert: str) -> Evaluation:
        with subject.opened(subject.routers[0], expert) as model:
            return evaluated(model)

    read: dict[str, RouterAnalysis] = {}
    for name in subject.routers:
        with subject.opened(name) as model:
            result = _read(model, subject, tasks, scoring, examples)
            scored = evaluated(model).scores if score else ()
            read[name] = replace(result, scores={each.task: each for each in scored})
    effects: list[Effect] = []
    if without_each:
        everyone = Evaluation(tuple(read[subject.routers[0]].scores.values()))
        effects = leave_one_out(everyone, subject.experts, without)
    return Analysis(
        experts=subject.experts,
        datasets=datasets,
        routers=read,
        oracle=oracle,
        effects=tuple(effects),
        settings={
            "routing": asdict(subject.routing),
            "limit": limit,
            "seed": seed,
            "formatting": asdict(scoring.formatting),
        },
    )


@dataclass(frozen=True)
class _Subject:
    """What is analysed: a routed `model`, or a `pool` and its `base` under several routers."""

    experts: tuple[str, ...]
    routers: tuple[str, ...]
    routing: Routing
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | None = None
    pool: Pool | None = None
    base: Base | None = None
    scores: Scores | None = None

    @contextmanager
    def opened(self, router: str, without: str | None = None) -> Iterator[PreTrainedModel]:
        """The routed model, in a pool's case by `router` and `without` one expert."""
        if self.pool is None or self.base is None:
            yield self.model
            return
        members = self.pool.select(leave_out=[without]) if without else self.pool
        routing = replace(self.routing, router=router)
        model = compose(members, self.base, routing=routing, scores=self.scores)
        try:
            yield model
        finally:
            detach(model)


def _subject(
    source: PreTrainedModel | Pool | str | Path,
    routers: Sequence[str] | None,
    routing: Routing,
    base: Base | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    scores: Scores | None,
) -> _Subject:
    if isinstance(source, PreTrainedModel) or (not isinstance(source, Pool) and is_routed(source)):
        if routers:
            raise ConfigError("Several routers need a pool; this model has its router already.")
        if not isinstance(source, PreTrainedModel):
            opened = open_model(source, base, routing=routing)
            source, tokenizer = opened.model, tokenizer or opened.tokenizer
        parts, tokenizer = composition_of(source), tokenizer or tokenizer_of(source)
        routing = parts.routing
        return _Subject(parts.experts, (routing.router,), routing, tokenizer, source)
    pool = Pool.open(source)
    loaded = resolve_base(base, pool.base)
    routings = [
        settled(replace(routing, router=name), pool, loaded.model, loaded.tokenizer)
        for name in dict.fromkeys(routers or (routing.router,))
    ]
    for each in routings[1:]:  # the first is composed before anything is read
        _check_router(each, pool, scores)
    names = tuple(dict.fromkeys(each.router for each in routings))
    tokenizer = tokenizer or loaded.tokenizer
    return _Subject(pool.names, names, routings[0], tokenizer, None, pool, loaded, scores)


def _check_router(routing: Routing, pool: Pool, scores: Scores | None) -> None:
    """Raise what composing `pool` by `routing` would, before other routers have been read."""
    router = router_of(routing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # composing warns
        check_routing(router, pool)
        narrowed = router.narrow(pool, scores)
        if isinstance(router, ByPrompt) and "scores" in router.given:
            router.tables(narrowed, scores)


def _read(
    model: PreTrainedModel,
    subject: _Subject,
    tasks: Sequence[Task],
    scoring: ScoringSettings,
    traced: int,
) -> RouterAnalysis:
    """All but the scores of the router of `model`."""
    parts = composition_of(model)
    encoder = Encoder.for_model(model, subject.tokenizer, scoring.formatting)
    model.eval()
    distributions: dict[str, RoutingDistribution] = {}
    choices: dict[str, NDArray[np.float64]] = {}
    for task in tasks:
        examples = task.evaluation_examples(scoring.limit, scoring.seed)
        tally = RoutingTally(subject.experts, parts)
        chosen = read_examples(model, encoder, task.name, examples, tally, scoring.token_budget)
        distributions[task.name] = tally.distribution
        if not distributions[task.name].whole("weight").any():
            raise EvaluationError(
                f"No expert acts on any token of task {task.name!r}: experts that act from certain "
                f"tokens on need these in the prompt (--chat for those of a chat template)."
            )
        if len(chosen):
            choices[task.name] = chosen
    kind = class_of(parts.routing.router)
    return RouterAnalysis(
        distributions,
        findings=tuple(findings_of(distributions)) if kind.needs and not kind.per_input else (),
        traces={task.name: _traces(model, encoder, task, scoring, traced) for task in tasks},
        choices=choices,
    )


def _traces(
    model: PreTrainedModel, encoder: Encoder, task: Task, scoring: ScoringSettings, most: int
) -> list[Trace]:
    examples = task.evaluation_examples(scoring.limit, scoring.seed)[:most]
    pairs, traces = encoder.pairs(examples), []
    prompts = [pair.prompt for pair in pairs]
    with routing_for(
        model, prompts, task=task.name, examples=examples, encoder=encoder
    ) as before_pass:
        for index, pair in enumerate(pairs):
            before_pass([index])
            traces.append(trace(model, encoder, pair))
    return traces
