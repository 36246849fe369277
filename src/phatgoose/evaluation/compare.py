"""Methods side by side on whole suites, as in the paper's Table 1.

Every finished run (one row on one dataset) is kept, so a comparison can be stopped, continued, and
extended by methods, experts or suites.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..base import Base, check_base, dtype_name, number_format
from ..config import Formatting, Routing
from ..errors import ConfigError, EvaluationError, RoutingError, TaskError
from ..experts.expert import Expert, warn_of_other_formatting
from ..experts.pool import Pool
from ..jobs import BaseLocation, Engine, LocalEngine
from ..routing.composition import asked_of, composition_if_any
from ..routing.open_model import OpenedModel, loaded_base
from ..routing.routers.prompt import States
from ..routing.routers.scores import best_expert, best_expert_by_task
from ..sites import ROUTED
from ..tasks.encoding import Encoder, as_read
from ..tasks.suites.registry import open_suite
from ..tasks.task import Sources, Suite, Task
from .evaluate import (
    MAX_NEW_TOKENS,
    TOKEN_BUDGET,
    Answer,
    EvaluationSet,
    Questions,
    ScoringSettings,
    TaskScore,
    score,
    task_score,
)
from .results import Comparison, Result, ResultStore, write_tables
from .rows import DERIVED, METHODS, Row, reference_row, rows_of, runnable_methods, single_rows

RESULTS = "results.jsonl"
PACKAGE = Path(__file__).parents[1]
OTHERS = ("apps", "analysis", "training")  # rooms that no score depends on

logger = logging.getLogger(__name__)

Source = Suite | Task | str | Path


def compare(
    pool: Pool | str | Path,
    suites: Iterable[Source] | Source,
    methods: Iterable[str] | str = "all",
    *,
    out: str | Path,
    base: Base | str | None = None,
    references: Mapping[str, str | Path] | None = None,
    limit: int | None = None,
    seed: int = 0,
    routing: Routing | None = None,
    formatting: Formatting | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    token_budget: int = TOKEN_BUDGET,
    sources: Sources | None = None,
    engine: Engine | None = None,
) -> Comparison:
    """Scores of `methods` over `pool` on `suites`, with intervals and paired differences.

    Finished runs are kept in `out`/results.jsonl and reused. The tables are written to
    `out`/comparison.md and .json.

    Args:
        pool: Experts, as `Pool.open` takes them.
        suites: Names in `suites.registry.SUITES`, folders of task files, suite files, single task
            files, Tasks or `Suite`s.
        methods: Names in `evaluation.rows.METHODS`, with settings of their routers as in
            "arrow:form=peft". "all" stands for those whose needs the pool meets, with a note on the
            others. Oracle and best-individual run every single expert once.
        out: The folder of results and tables.
        base: A loaded base or its name; None loads the pool's own.
        references: Further models by label: an expert (such as a multitask one), another pool (by
            router phatgoose, such as one of jointly trained experts), a routed model, a base.
        limit: Maximum examples of each dataset, the same ones for all methods; None is all of them.
        seed: Seed of the draw.
        routing: Gives k (for every router, where it is not None), kernel and embedder.
        formatting: How inputs are cut and wrapped; None is `Formatting()`.
        max_new_tokens: Maximum tokens of a generated answer, where a task sets none.
        token_budget: Maximum tokens of a batch.
        sources: Where the files of suites are; None is the Hub.
        engine: Where runs are scored; None is this process. Results are the same.

    Raises:
        ConfigError: A method is unknown.
        PoolError: The pool doesn't meet the needs of a method that was named.
        WrongBaseError: The experts are of another base.
        EvaluationError: Another process writes to `out`.
        PhatgooseError: What opening pools, suites and models and scoring them raise.
    """
    pool = Pool.open(pool)
    routing = routing or Routing()
    chosen, notes = runnable_methods(pool, methods, routing)
    settings = ScoringSettings(
        formatting or Formatting(), limit, seed, max_new_tokens, token_budget
    )
    columns, datasets = _load(suites, sources, settings)
    base = loaded_base(pool, base)
    others = [reference_row(label, place, routing) for label, place in (references or {}).items()]
    rows = [*rows_of(pool, chosen, routing), *others]
    singles = single_rows(pool) if set(DERIVED) & set(chosen) else []
    _check(base, rows, others, singles)
    for note in notes:  # after what may be refused
        warnings.warn(note, stacklevel=2)
    _report_inputs(base, (*rows, *singles), datasets, settings.formatting)
    with ResultStore.alone(Path(out) / RESULTS) as store:
        results = _run(rows, singles, datasets, base, store, engine or LocalEngine())
    comparison = Comparison(
        suites=columns,
        labels={row.name: row.label for row in rows},
        results={row.name: results[row.name] for row in rows},
        experts={row.name: results[row.name] for row in singles},
        notes=tuple(notes),
        settings={
            "base": asdict(base.reference),
            "dtype": dtype_name(base.model.dtype),
            "experts": list(pool.names),
            "k": routing.k,
            "kernel": routing.kernel,
            "code": code_version(),
            "machine": chip_of(base.model.device),
            **asdict(settings),
        },
    )
    comparison = _with_derived(comparison, chosen, pool)
    write_tables(comparison, Path(out))
    return comparison


@cache
def code_version() -> str:
    """The release, and a hash of the code that decides what a score is, without comments."""
    every = sorted((path.relative_to(PACKAGE).parts[0], path) for path in PACKAGE.rglob("*.py"))
    files = [path for room, path in every if room not in OTHERS]
    trees = [ast.dump(ast.parse(path.read_text(encoding="utf-8"))) for path in files]
    digest = hashlib.sha256("".join(trees).encode())
    digest.update((PACKAGE / "routing" / "kernels" / "native.cpp").read_bytes())
    root = (PACKAGE / "__init__.py").read_text(encoding="utf-8")  # it imports this module
    release = root.partition('__version__ = "')[2].partition('"')[0]
    return f"{release}+{digest.hexdigest()[:12]}"


def chip_of(device: torch.device) -> str:
    """The name of the GPU that `device` is, or of this machine's kind of processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _check(base: Base, rows: Sequence[Row], others: Sequence[Row], singles: Sequence[Row]) -> None:
    if hasattr(base.model, ROUTED):
        raise RoutingError("This base model is routed already; detach it first.")
    if not rows and not singles:
        raise ConfigError("No method was given to compare.")
    names = Counter([*METHODS, *(row.name for row in (*others, *singles))])
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"Two rows would be called {twice[0]!r}; rename an expert or reference.")
    for row in (*rows, *singles):
        if row.base is not None and row.base.fingerprint:
            check_base(row.base, base.reference, row.label)


def _load(
    suites: Iterable[Source] | Source, sources: Sources | None, settings: ScoringSettings
) -> tuple[dict[str, tuple[str, ...]], dict[str, EvaluationSet]]:
    """(datasets' names by suite, datasets by name)."""
    columns: dict[str, tuple[str, ...]] = {}
    datasets: dict[str, EvaluationSet] = {}
    for suite in [suites] if isinstance(suites, str | Path | Suite | Task) else suites:
        if isinstance(suite, Task):
            opened = Suite.of(suite.name, [suite])
        else:
            opened = suite if isinstance(suite, Suite) else open_suite(suite)
        if opened.name in columns:
            raise TaskError(f"Two suites are called {opened.name!r}; rename one.")
        for task in opened.load(sources):
            dataset = EvaluationSet.of(task, settings)
            if datasets.setdefault(task.name, dataset).digest != dataset.digest:
                raise TaskError(f"Two suites have different datasets called {task.name!r}.")
        columns[opened.name] = opened.names
    return columns, datasets


def _report_inputs(
    base: Base, rows: Sequence[Row], datasets: Mapping[str, EvaluationSet], formatting: Formatting
) -> None:
    """Log what is cut of the inputs; warn of experts trained on inputs of another form."""
    encoder = Encoder.of(base, formatting)
    for name, dataset in datasets.items():
        dataset.questions(encoder).cuts.report(name)
    records = [record for row in rows if row.pool is not None for record in row.pool.records()]
    distinct = {json.dumps(record, sort_keys=True): record for record in records}
    examples = [example for dataset in datasets.values() for example in dataset.examples]
    warn_of_other_formatting(distinct.values(), as_read(formatting, examples))


def _run(
    rows: Sequence[Row],
    singles: Sequence[Row],
    datasets: Mapping[str, EvaluationSet],
    base: Base,
    store: ResultStore,
    engine: Engine,
) -> dict[str, dict[str, Result]]:
    """Every row's result on every dataset, computed by `engine` if the store has none."""
    every = {row.name: row for row in (*rows, *singles)}
    runs = {
        name: [run_of(row, dataset, base) for dataset in datasets.values()]
        for name, row in every.items()
    }
    missing = {  # by key: two rows may be one model
        json.dumps(run.key, sort_keys=True): run
        for each in runs.values()
        for run in each
        if store.get(run.key) is None
    }.values()

    def stored(row: str) -> dict[str, Mapping[str, Any]]:
        return {run.dataset: store.get(run.key) or {} for run in runs[row]}

    # Rows that may leave inputs to single experts come last: these have answered by then.
    sharing = {name for name, row in every.items() if singles and row.per_input}
    total = sum(map(len, runs.values()))
    finished = total - len(missing)
    with tqdm(total=total, initial=finished, desc="compare", unit="run", disable=None) as bar:
        for is_last in (False, True):
            part = [run for run in missing if (run.row in sharing) == is_last]
            if not part:
                continue
            answered = {row.name: stored(row.name) for row in singles if is_last}
            workshop = RunWorkshop(base, every, datasets, answered)
            # An error in this loop ends the engine's workers at once.
            with closing(engine.run(workshop, part, bar)) as results:
                for run, result in results:
                    store.add(run.key, result)
                    finished += 1
                    logger.info("[%d/%d] %s: %.3f", finished, total, run.name, result["score"])
    return {
        name: {dataset: Result.of(result) for dataset, result in stored(name).items()}
        for name in every
    }


def _with_derived(comparison: Comparison, methods: Sequence[str], pool: Pool) -> Comparison:
    experts = {
        name: {task: result.score for task, result in by_task.items()}
        for name, by_task in comparison.experts.items()
    }
    results, labels = dict(comparison.results), dict(comparison.labels)
    choices: dict[str, dict[str, str]] = {}
    if "best-individual" in methods:
        best = best_expert(experts, pool.names)
        choices["best-individual"] = dict.fromkeys(experts[best], best)
    if "oracle" in methods:
        choices["oracle"] = best_expert_by_task(experts, pool.names)
    for name, chosen in choices.items():
        labels[name] = METHODS[name]
        results[name] = {task: comparison.experts[expert][task] for task, expert in chosen.items()}
    return replace(comparison, results=results, labels=labels, choices=choices)


@dataclass(frozen=True)
class Run:
    """The job of scoring one row on one dataset; `key` identifies its result in the store."""

    row: str
    dataset: str
    key: Mapping[str, Any]
    size: int = 1

    @property
    def name(self) -> str:
        return f"{self.row} on {self.dataset}"

    @property
    def group(self) -> str:
        return self.row

    def again(self) -> Run:
        return self


def run_of(row: Row, dataset: EvaluationSet, base: Base) -> Run:
    """The run of `row` on `dataset`; its key says all that its result depends on."""
    key = {
        "base": base.fingerprint,
        "dtype": number_format(base.model),
        "method": dict(row.identity),
        "task": dataset.name,
        "examples": dataset.digest,
        "code": code_version(),
    }
    return Run(row.name, dataset.name, key)


Answered = Mapping[str, Mapping[str, Mapping[str, Any]]]  # stored results by expert and dataset


@dataclass(frozen=True)
class RunWorkshop:
    """Does runs with a base, from rows and datasets by name.

    `answered` are the single experts' results. One for another process has locations of base and
    experts, and the version of its `code`.
    """

    base: Base | BaseLocation
    rows: Mapping[str, Row]
    datasets: Mapping[str, EvaluationSet]
    answered: Answered = field(default_factory=dict)
    code: str = ""

    @contextmanager
    def open(self) -> Iterator[Callable[[Run], dict[str, Any]]]:
        """A function that does a run and returns its result as it is stored.

        Closing the context restores the base. Raises EvaluationError for another version of the
        code.
        """
        base, rows = self._loaded()
        states: States = {}  # readings of prompts, which rows share
        questions: dict[str, Questions] = {}  # by dataset: all rows of this base are asked these
        with ExitStack() as composed:
            at: str | None = None
            opened = OpenedModel(base.model, base.tokenizer)

            def result_of(run: Run) -> dict[str, Any]:
                nonlocal at, opened
                if run.row != at:
                    at = None
                    composed.close()
                    opened = composed.enter_context(rows[run.row].model(base))
                    at = run.row
                    parts = composition_if_any(base.model)
                    if parts is not None and parts.prompt_router is not None:
                        parts.prompt_router.states = states
                dataset = self.datasets[run.dataset]
                asked = questions.get(dataset.name) if opened.model is base.model else None
                if asked is None:
                    formatting = dataset.settings.formatting
                    encoder = Encoder.for_model(opened.model, opened.tokenizer, formatting)
                    asked = dataset.questions(encoder)
                    if opened.model is base.model:
                        questions[dataset.name] = asked
                return _result(opened.model, dataset, asked, self.answered)

            yield result_of

    def _loaded(self) -> tuple[Base, Mapping[str, Row]]:
        if not isinstance(self.base, BaseLocation):
            return self.base, self.rows
        if self.code != code_version():
            raise EvaluationError(
                f"A worker runs phatgoose {code_version()}, but the comparison was begun with "
                f"{self.code}; install the same version on all machines."
            )
        experts: dict[str, Expert] = {}
        return self.base.load(), {name: row.loaded(experts) for name, row in self.rows.items()}

    def portable(self) -> RunWorkshop:
        if isinstance(self.base, BaseLocation):
            return self
        rows = {name: row.portable() for name, row in self.rows.items()}
        base = BaseLocation.of(self.base)
        return replace(self, base=base, rows=rows, code=code_version())


def _result(
    model: PreTrainedModel, dataset: EvaluationSet, questions: Questions, answered: Answered
) -> dict[str, Any]:
    """The result of one run, as it is stored: `tied` are examples with several best choices."""
    begun = time.monotonic()
    shared = answered_by_experts(answered, model, dataset, questions)
    if shared is not None:
        scored, tied = shared
    else:
        scored = score(model, dataset, questions)
        tied = [i for i, prediction in enumerate(scored.predictions) if prediction.tied]
    rows = scored.sample.rows
    return {
        **scored.to_dict(),
        **({} if rows is None else {"rows": rows.tolist()}),
        "metrics": list(dataset.metrics),
        "seconds": round(time.monotonic() - begun, 2),
        "answers": [prediction.answer for prediction in scored.predictions],
        "tied": tied,
        "marks": [prediction.marks for prediction in scored.predictions],
    }


def answered_by_experts(
    answered: Answered, model: PreTrainedModel, dataset: EvaluationSet, questions: Questions
) -> tuple[TaskScore, list[int]] | None:
    """The score of a routed model that leaves each input to one expert, who has answered it.

    Beside the score are the examples with several best choices. None for other models, and where an
    expert's answers aren't known. What differs from scoring the model itself is which inputs shared
    a batch, hence no more than rounding.
    """
    parts = composition_if_any(model)
    # More experts an input are scored by the model, which then reads the inputs itself.
    context = parts.context if parts is not None else None
    if parts is None or context is None or context.router is None or context.router.k > 1:
        return None
    if not answered or "task" in parts.router.given:
        return None
    asked = asked_of(parts, questions.prompts, dataset.examples, questions.encoder)
    chosen = context.choose(asked, examples=dataset.examples).lone()
    results = {name: by.get(dataset.name) for name, by in answered.items()}
    names = [] if chosen is None else [parts.experts[z] for z in chosen.tolist()]
    if chosen is None or any(results.get(name) is None for name in names):
        return None
    each = [results[name] or {} for name in names]
    score = task_score(dataset, [Answer(result["answers"][i]) for i, result in enumerate(each)])
    tied = [i for i, result in enumerate(each) if i in result["tied"]]
    return replace(score, ties=len(tied), cuts=questions.cuts.record()), tied
