"""The analysis of a routed model on tasks, or of one pool under several routers."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base import Base
from ..config import Formatting, Routing
from ..errors import ConfigError, EvaluationError, TaskError
from ..evaluation import evaluate
from ..evaluation.evaluate import Evaluation, ScoringSettings, TaskScore
from ..experts.pool import Pool
from ..files import write_text
from ..routing.compose import compose, detach
from ..routing.composition import composition_of, routing_for
from ..routing.open_model import is_routed, loaded_base, open_model
from ..routing.routers.auto import settled
from ..routing.routers.prompt import ByPrompt
from ..routing.routers.registry import WEIGHTS, class_of, router_of
from ..routing.routers.router import check_routing
from ..routing.routers.scores import Scores, read_scores
from ..tasks.encoding import Encoder
from ..tasks.loading import given_tasks
from ..tasks.task import Task, named_apart
from . import measures, routing_distribution
from .findings import Finding, findings_of, vector_similarity
from .measures import ORACLE, SMOOTHING, Agreement, Correlation, Divergence, Effect
from .routing_distribution import MEASURES, PARTS, Measure, RoutingDistribution, RoutingTally
from .traces import ChoiceKeeper, Trace, trace


@dataclass(frozen=True)
class RouterAnalysis:
    """What `analyse` found for one router.

    Attributes:
        distributions: Of the experts, by dataset.
        scores: By dataset, empty if not scored.
        findings: Warnings about the routing.
        traces: Texts token by token, by dataset.
        similarity: `findings.vector_similarity`, [E, E].
        choices: Weights of each prompt's experts by dataset, [prompts, E], in no order of the
            data's; empty for a router that chooses for every token.
    """

    distributions: Mapping[str, RoutingDistribution]
    scores: Mapping[str, TaskScore] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    traces: Mapping[str, Sequence[Trace]] = field(default_factory=dict)
    similarity: NDArray[Any] | None = None
    choices: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def by_dataset(self, measure: Measure = "weight") -> dict[str, NDArray[np.float64]]:
        """The whole-model distribution on each dataset, [E]."""
        return {name: found.whole(measure) for name, found in self.distributions.items()}

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
        agreements: How far two routers agree, by pairs of routers.
        effects: Those of leaving experts out, if asked for.
        smoothing: The share of the uniform distribution in divergences.
        settings: How everything was read.
    """

    experts: tuple[str, ...]
    datasets: tuple[str, ...]
    routers: Mapping[str, RouterAnalysis]
    oracle: Mapping[str, str] = field(default_factory=dict)
    agreements: Mapping[tuple[str, str], Agreement] = field(default_factory=dict)
    effects: tuple[Effect, ...] = ()
    smoothing: float = SMOOTHING
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
        to, back = (measures.kl_divergence(*each, self.smoothing) for each in ((p, q), (q, p)))
        return Divergence(to, back)

    def correlation(self, router: str, other: str = ORACLE) -> Correlation | None:
        """The correlation of KL(router‖other) with the router's score over datasets (paper 4.4), or
        None.
        """
        scores = self.routers[router].scores
        if not scores or (other == ORACLE and not self.oracle):
            return None
        pairs = [
            (self.divergence(router, other, dataset).to, scores[dataset].score)
            for dataset in self.datasets
        ]
        return measures.correlation(*zip(*pairs, strict=True))

    def overlaps(self, router: str) -> NDArray[np.float64]:
        """Overlap of a router's distributions on every two datasets, by weight, [D, D]."""
        whole = self.routers[router].by_dataset().values()
        return np.array([[measures.overlap(p, q) for q in whole] for p in whole])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: all numbers, no text of the data."""
        pairs = [(a, b) for a in self.routers for b in self._others(a)]
        return {
            "format": "phatgoose-analysis-1",
            "settings": dict(self.settings),
            "smoothing": self.smoothing,
            "experts": list(self.experts),
            "datasets": list(self.datasets),
            "oracle": dict(self.oracle),
            "routers": {name: self._router(name) for name in self.routers},
            "divergences": [
                {"router": a, "other": b, "dataset": d, **asdict(self.divergence(a, b, d))}
                for a, b in pairs
                for d in self.datasets
            ],
            "correlations": [
                {"router": a, "other": b, **asdict(found)}
                for a, b in pairs
                if (found := self.correlation(a, b)) is not None
            ],
            "agreements": [
                {"routers": list(pair), **asdict(found)} for pair, found in self.agreements.items()
            ],
            "leave_one_out": [asdict(effect) for effect in self.effects],
        }

    def write_json(self, path: str | Path) -> None:
        """Write `to_dict`. Raises EvaluationError if that can't be done."""
        content = json.dumps(self.to_dict(), ensure_ascii=False) + "\n"
        write_text(Path(path), content, EvaluationError)

    def _others(self, router: str) -> list[str]:
        oracle = [ORACLE] if self.oracle and ORACLE not in self.routers else []
        return [name for name in [*self.routers, *oracle] if name != router]

    def _router(self, name: str) -> dict[str, Any]:
        router = self.routers[name]
        scores = {
            task: {"metric": s.metric, "score": s.score, "low": s.low, "high": s.high, "n": s.n}
            for task, s in router.scores.items()
        }
        return {
            "scores": scores,
            "datasets": {task: _numbers(found) for task, found in router.distributions.items()},
            "overlaps": self.overlaps(name).tolist(),
            "findings": [asdict(finding) for finding in router.findings],
            "similarity": None if router.similarity is None else router.similarity.tolist(),
            "choices": {task: found.tolist() for task, found in router.choices.items()},
        }


def _numbers(found: RoutingDistribution) -> dict[str, Any]:
    def plain(rows: Mapping[str, NDArray[np.float64]]) -> dict[str, list[float]]:
        return {name: row.tolist() for name, row in rows.items()}

    whole, groups = found.whole("weight"), {"layer": found.by_layer(), "kind": found.by_kind()}
    numbers: dict[str, Any] = {
        "tokens": {part: found.passed(part) for part in PARTS},
        "token_entropy": found.token_entropy(),
        **{measure: found.whole(measure).tolist() for measure in MEASURES},
        "by_part": {part: found.whole("weight", part).tolist() for part in PARTS},
        **{f"by_{group}": plain(rows) for group, rows in groups.items()},
        "by_site": {
            "probability": plain(found.by_site("probability")),
            "weight": plain(found.by_site("weight")),
        },
    }
    if whole.any():
        numbers |= {
            "load": measures.load(whole).tolist(),
            "effective_experts_by": {
                group: {
                    name: measures.effective_experts(row) for name, row in rows.items() if row.any()
                }
                for group, rows in groups.items()
            },
            "entropy": measures.entropy(whole),
            "effective_experts": measures.effective_experts(whole),
            "concentration": measures.concentration(whole),
        }
    return numbers


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
    smoothing: float = SMOOTHING,
    max_new_tokens: int = evaluate.MAX_NEW_TOKENS,
    token_budget: int = evaluate.TOKEN_BUDGET,
) -> Analysis:
    """Which experts serve the tokens of `tasks` in a routed model, or a pool under `routers`.

    Every router reads the prompt and the right answer of the same examples.

    Args:
        source: A routed model or its folder, or a pool (folder, manifest).
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
        smoothing: The share of the uniform distribution in KL divergences.
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
    measures.smoothed([1.0], smoothing)  # refuse a bad one before the work
    scoring = ScoringSettings(formatting or Formatting(), limit, seed, max_new_tokens, token_budget)
    settings = ReadingSettings(scoring, score, examples)
    scores = read_scores(scores) if isinstance(scores, str | Path) else scores
    routers = [routers] if isinstance(routers, str) else routers
    routing = routing or Routing()
    subject = _subject(source, routers, routing, base, tokenizer, scores)
    if without_each and not (subject.is_pool and score and len(subject.experts) > 1):
        raise ConfigError("Leaving experts out in turn needs a pool of several, and scores.")
    if without_each and (named := class_of(subject.routers[0]).name) in ("single", WEIGHTS):
        raise ConfigError(
            f"Router {named} can't do without the experts that it names; put another one first."
        )
    datasets = tuple(task.name for task in tasks)
    oracle = measures.oracle_experts(scores, subject.experts, datasets)
    found, agreements = _read_routers(subject, tasks, settings)
    effects = _effects(subject, tasks, settings, found) if without_each else []
    return Analysis(
        experts=subject.experts,
        datasets=datasets,
        routers=found,
        oracle=oracle,
        agreements=agreements,
        effects=tuple(effects),
        smoothing=smoothing,
        settings={
            "routing": asdict(subject.routing),
            "limit": limit,
            "seed": seed,
            "formatting": asdict(scoring.formatting),
        },
    )


@dataclass(frozen=True)
class ReadingSettings:
    scoring: ScoringSettings
    score: bool
    traced: int


@dataclass(frozen=True)
class _Subject:
    """What is analysed: `opened(router)` is the routed model while its context is open.

    `opened(router, expert)` is the model without that expert, for pools only (`is_pool`).
    """

    experts: tuple[str, ...]
    routers: tuple[str, ...]
    routing: Routing
    tokenizer: PreTrainedTokenizerBase
    opened: Callable[..., AbstractContextManager[PreTrainedModel]]
    is_pool: bool = True


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
    pool = Pool.open(source)
    loaded = loaded_base(pool, base)
    found = [
        settled(replace(routing, router=name), pool, loaded.model, loaded.tokenizer)
        for name in dict.fromkeys(routers or (routing.router,))
    ]
    names, routing = [each.router for each in found], found[0]
    tokenizer = tokenizer or loaded.tokenizer
    for name in names[1:]:  # the first is composed before anything is read
        _check_router(replace(routing, router=name), pool, scores, loaded.tokenizer)

    @contextmanager
    def opened(router: str, without: str | None = None) -> Iterator[PreTrainedModel]:
        members = pool if without is None else pool.select(leave_out=[without])
        model = compose(members, loaded, routing=replace(routing, router=router), scores=scores)
        try:
            yield model
        finally:
            detach(model)

    return _Subject(pool.names, tuple(dict.fromkeys(names)), routing, tokenizer, opened)


def _check_router(
    routing: Routing, pool: Pool, scores: Scores | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise what composing `pool` by `routing` would, before other routers have been read."""
    router = router_of(routing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # composing warns
        check_routing(router, pool)
        narrowed = router.narrow(pool, scores)
        # Others are made of vectors and readings alone, which have been checked.
        by_more = router.given or "embeddings" in router.needs
        if isinstance(router, ByPrompt) and by_more:
            router.ready(router.tables(narrowed, scores))


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

    def already(_: str) -> AbstractContextManager[PreTrainedModel]:
        return nullcontext(model)

    names = (parts.routing.router,)
    return _Subject(parts.experts, names, parts.routing, tokenizer, already, is_pool=False)


def _read_routers(
    subject: _Subject, tasks: Sequence[Task], settings: ReadingSettings
) -> tuple[dict[str, RouterAnalysis], dict[tuple[str, str], Agreement]]:
    found: dict[str, RouterAnalysis] = {}
    with tempfile.TemporaryDirectory(prefix="phatgoose-") as folder:
        # By number: a router's name can hold a path.
        places = {name: Path(folder) / str(i) for i, name in enumerate(subject.routers)}
        for name, place in places.items():
            with subject.opened(name) as model:
                files = place if len(places) > 1 else None
                found[name] = _one_router(model, subject, tasks, settings, files)
        agreements = {
            (a, b): measures.agreement(places[a], places[b], len(subject.experts))
            for a, b in combinations(found, 2)
        }
    return found, {pair: common for pair, common in agreements.items() if common}


def _one_router(
    model: PreTrainedModel,
    subject: _Subject,
    tasks: Sequence[Task],
    settings: ReadingSettings,
    files: Path | None,
) -> RouterAnalysis:
    parts, scoring = composition_of(model), settings.scoring
    encoder = Encoder.for_model(model, subject.tokenizer, scoring.formatting)
    model.eval()
    index = torch.tensor([subject.experts.index(expert) for expert in parts.experts])
    decisions = [measures.DecisionFiles(files, index)] if files is not None else []
    present = {site: layer.experts for site, layer in parts.layers.items()}
    distributions: dict[str, RoutingDistribution] = {}
    choices: dict[str, NDArray[np.float64]] = {}
    for task in tasks:
        chosen = task.evaluation_examples(scoring.limit, scoring.seed)
        tally, kept = RoutingTally(parts.experts, present), ChoiceKeeper(parts)
        observers: list[routing_distribution.Observer] = [tally, kept, *decisions]
        routing_distribution.read_examples(
            model, encoder, task.name, chosen, observers, scoring.token_budget
        )
        distributions[task.name] = tally.distribution.over(subject.experts)
        if not distributions[task.name].whole("weight").any():
            raise EvaluationError(
                f"No expert acts on any token of task {task.name!r}: experts that act from certain "
                f"tokens on need these in the prompt (--chat for those of a chat template)."
            )
        found = kept.weights(subject.experts)
        if len(found):
            choices[task.name] = found
    scores = (
        evaluate.score_tasks(model, tasks, scoring, subject.tokenizer).scores
        if settings.score
        else ()
    )
    similarity = vector_similarity(model)
    return RouterAnalysis(
        distributions,
        {score.task: score for score in scores},
        tuple(findings_of(distributions, similarity)),
        {task.name: _traces(model, encoder, task, settings) for task in tasks},
        similarity,
        choices,
    )


def _traces(
    model: PreTrainedModel, encoder: Encoder, task: Task, settings: ReadingSettings
) -> list[Trace]:
    scoring = settings.scoring
    chosen = task.evaluation_examples(scoring.limit, scoring.seed)[: settings.traced]
    if not chosen:
        return []
    pairs, traces = encoder.pairs(chosen), []
    prompts = [pair.prompt for pair in pairs]
    with routing_for(
        model, prompts, task=task.name, examples=chosen, encoder=encoder
    ) as before_pass:
        for index, pair in enumerate(pairs):
            before_pass([index])
            traces.append(trace(model, encoder, pair))
    return traces


def _effects(
    subject: _Subject,
    tasks: Sequence[Task],
    settings: ReadingSettings,
    found: Mapping[str, RouterAnalysis],
) -> list[Effect]:
    router = subject.routers[0]

    def without(expert: str) -> Evaluation:
        with subject.opened(router, expert) as model:
            return evaluate.score_tasks(model, tasks, settings.scoring, subject.tokenizer)

    everyone = Evaluation(tuple(found[router].scores.values()))
    return measures.leave_one_out(everyone, subject.experts, without)
