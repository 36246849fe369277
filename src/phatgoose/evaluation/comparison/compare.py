"""Methods side by side on whole suites, as in the paper's Table 1.

Every finished cell (one row on one dataset) is kept, so a comparison can be stopped, continued, and
extended by methods, experts or suites.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...base import Base, check_base, dtype_name
from ...config import Formatting, Routing
from ...errors import ConfigError, EvaluationError, RoutingError, TaskError
from ...experts.expert import warn_of_other_formatting
from ...experts.pool import Pool
from ...files import first_line
from ...jobs import Engine, LocalEngine
from ...routing.open_model import loaded_base
from ...routing.routers.router import Scores, best_expert, best_expert_by_task
from ...sites import ROUTED
from ...tasks.encoding import Encoder, as_read
from ...tasks.suites.registry import open_suite
from ...tasks.task import Sources, Suite, Task
from ..evaluate import MAX_NEW_TOKENS, TOKEN_BUDGET, EvaluationSet, ScoringSettings
from ..intervals import Sample
from . import cells as scoring
from .cells import CellWorkshop
from .methods import DERIVED, METHODS, Row, reference_row, rows_of, runnable_methods, single_rows
from .result_store import ResultStore
from .tables import Comparison, Result, write_tables

RESULTS = "results.jsonl"

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
    `out`/comparison.md, .csv and .json.

    Args:
        pool: Experts, as `Pool.open` takes them.
        suites: Names in `suites.registry.SUITES`, folders of task files, suite files, single task
            files, Tasks or `Suite`s.
        methods: Names in `comparison.methods.METHODS`, with settings of their routers as in
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
    wanted, notes = runnable_methods(pool, methods, routing)
    settings = ScoringSettings(
        formatting or Formatting(), limit, seed, max_new_tokens, token_budget
    )
    columns, datasets = _load(suites, sources, settings)
    base = loaded_base(pool, base)
    rows = rows_of(pool, wanted, routing)
    rows += [reference_row(label, place, routing) for label, place in (references or {}).items()]
    singles = single_rows(pool) if set(DERIVED) & set(wanted) else []
    _check(base, rows, singles)
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
            **_settings(base, pool, settings, routing),
            **scoring.circumstances(base.model.device, Path(out) / RESULTS),
        },
    )
    comparison = _with_derived(comparison, wanted, pool)
    write_tables(comparison, Path(out))
    return comparison


def _settings(
    base: Base, pool: Pool, settings: ScoringSettings, routing: Routing
) -> dict[str, Any]:
    return {
        "base": asdict(base.reference),
        "dtype": dtype_name(base.model.dtype),
        "experts": list(pool.names),
        "limit": settings.limit,
        "seed": settings.seed,
        "k": routing.k,
        "kernel": routing.kernel,
        "max_new_tokens": settings.max_new_tokens,
        "token_budget": settings.token_budget,
        "code": scoring.code_version(),
        "formatting": asdict(settings.formatting),
    }


def _check(base: Base, rows: Sequence[Row], singles: Sequence[Row]) -> None:
    if hasattr(base.model, ROUTED):
        raise RoutingError("This base model is routed already; detach it first.")
    if not rows and not singles:
        raise ConfigError("No method was given to compare.")
    taken = {*METHODS, *(row.name for row in rows)}
    for name in (row.name for row in singles):
        if name in taken:
            raise ConfigError(f"An expert and another row are both called {name!r}; rename one.")
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
    if not datasets:
        raise TaskError("No suite was given to compare on.")
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
    cells = {
        name: [scoring.cell_of(row, dataset, base) for dataset in datasets.values()]
        for name, row in every.items()
    }
    missing = {  # by key: two rows may be one model
        json.dumps(cell.key, sort_keys=True): cell
        for each in cells.values()
        for cell in each
        if store.get(cell.key) is None
    }.values()

    def stored(row: str) -> dict[str, Mapping[str, Any]]:
        return {cell.dataset: store.get(cell.key) or {} for cell in cells[row]}

    # Rows that may leave inputs to single experts come last: these have answered by then.
    sharing = {name for name, row in every.items() if singles and row.per_input}
    total = sum(map(len, cells.values()))
    finished = total - len(missing)
    workshop = CellWorkshop(base, every, datasets)
    with tqdm(total=total, initial=finished, desc="compare", unit="run", disable=None) as bar:
        for is_last in (False, True):
            part = [cell for cell in missing if (cell.row in sharing) == is_last]
            if not part:
                continue
            known = {row.name: stored(row.name) for row in singles if is_last}
            # An error in this loop ends the engine's workers at once.
            with closing(engine.run(replace(workshop, known=known), part, bar)) as results:
                for cell, result in results:
                    store.add(cell.key, result)
                    finished += 1
                    logger.info("[%d/%d] %s: %.3f", finished, total, cell.name, result["score"])
    return {
        name: {dataset: _result(result) for dataset, result in stored(name).items()}
        for name in every
    }


def _result(stored: Mapping[str, Any]) -> Result:
    try:
        plain = {n: stored[n] for n in ("task", "metric", "low", "high", "ties", "seconds")}
        sample = Sample.of(stored["metrics"], stored["marks"], stored.get("rows"))
        return Result(**plain, sample=sample)
    except (LookupError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"A line of {RESULTS} is no result of compare ({first_line(error)}); move that file "
            f"away, and everything is scored again."
        ) from error


def _with_derived(comparison: Comparison, wanted: Sequence[str], pool: Pool) -> Comparison:
    experts: Scores = {
        name: {task: result.score for task, result in by_task.items()}
        for name, by_task in comparison.experts.items()
    }
    results, labels = dict(comparison.results), dict(comparison.labels)
    choices: dict[str, dict[str, str]] = {}
    if "best-individual" in wanted:
        best = best_expert(experts, pool.names)
        choices["best-individual"] = dict.fromkeys(experts[best], best)
    if "oracle" in wanted:
        choices["oracle"] = best_expert_by_task(experts, pool.names)
    for name, chosen in choices.items():
        labels[name] = METHODS[name]
        results[name] = {task: comparison.experts[expert][task] for task, expert in chosen.items()}
    return replace(comparison, results=results, labels=labels, choices=choices)
